"""Kimi-K2's `tiktoken.model` as a byte-level BPE of `tokenizers`, without the checkpoint's code.

The file has one token a line: base64 of its bytes, a blank, its rank (which is its id). The
pre-tokenizer's pattern and the block of 256 special ids after the ranks are those of
`tokenization_kimi.py` in moonshotai/Kimi-K2-Instruct. That file also cuts runs of more than
25 000 blank or non-blank characters before BPE; here they stay whole.
"""

import base64
import binascii
from collections.abc import Mapping

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as BPETokenizer

NUM_RESERVED_IDS = 256

_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"

KIMI_PATTERN = "|".join(
    (
        r"[\p{Han}]+",
        f"{_BEFORE}{_UPPER}*{_LOWER}+{_CONTRACTION}",
        f"{_BEFORE}{_UPPER}+{_LOWER}*{_CONTRACTION}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
"""`&&` is the intersection of character classes, in tiktoken's engine as in `tokenizers`' own."""


def byte_alphabet() -> list[str]:
    """The character that stands for each byte in a byte-level BPE's vocabulary (GPT-2's table)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    rest = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(rest)) for byte in range(256)]


def parse_ranks(data: bytes) -> dict[bytes, int]:
    """Bytes of a token -> rank. Raises ValueError that names the line."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise ValueError(f"line {number} is not a base64 token and a rank") from error
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f"the {len(ranks)} ranks are not 0..{len(ranks) - 1}, once each")
    return ranks


def recover_merges(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Every pair that makes a token, in order of the token's rank.

    BPE by rank joins whichever neighbours make the lowest-ranked token. A list of merges gives the
    same result if it has all the splits of a token, not just the one seen in training.
    """
    merges: list[tuple[int, int, int, bytes, bytes]] = []
    for token, rank in ranks.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ranks and right in ranks:
                merges.append((rank, ranks[left], ranks[right], left, right))
    return [(left, right) for *_, left, right in sorted(merges)]


def special_tokens(num_ranks: int, named: Mapping[int, AddedToken]) -> list[AddedToken]:
    """The tokens after the ranks, in order of id; ids without a name are reserved ones."""
    end = max([num_ranks + NUM_RESERVED_IDS - 1, *named]) + 1
    return [
        named.get(token_id)
        or AddedToken(f"<|reserved_token_{token_id}|>", special=True, normalized=False)
        for token_id in range(num_ranks, end)
    ]


def build(
    data: bytes, named: Mapping[int, AddedToken], pattern: str = KIMI_PATTERN
) -> BPETokenizer:
    """The tokenizer of a `tiktoken.model` and of tokenizer_config.json's `added_tokens_decoder`."""
    ranks = parse_ranks(data)
    alphabet = byte_alphabet()

    def spell(token: bytes) -> str:
        return "".join([alphabet[byte] for byte in token])

    vocab = {spell(token): rank for token, rank in ranks.items()}
    merges = [(spell(left), spell(right)) for left, right in recover_merges(ranks)]
    # ignore_merges: tiktoken, too, looks a whole word up before it merges.
    tokenizer = BPETokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(special_tokens(len(ranks), named))
    return tokenizer
