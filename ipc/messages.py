"""What the daemon and its workers say to each other.

Structs are frozen and `array_like`: on the wire a message is a msgpack array that begins with its
tag. They grow at the end, with defaults, so that protocol N and N-1 understand each other.
Every message of a running worker carries `(epoch, seq)`; a receiver discards older epochs.

    worker                       daemon
      | -- Hello ------------------> |      protocol numbers are compared
      | <------------------- Load -- |
      | -- Progress (many) --------> |
      | -- Ready | Failed ---------> |
      | <------------------- Step -- |      up to `pipeline_depth` of them in flight
      | -- StepOutput -------------> |      strictly in the order of the steps

Integer vectors that grow with the batch (`Step.decodes`, `StepOutput.token_ids`) travel as raw
little-endian int32, so that packing them costs one copy instead of one call per row.
"""

import sys
from array import array
from collections.abc import Iterable

import msgspec

PROTOCOL = 1
"""Raised when a message changes in a way that the receiver must know."""

assert sys.byteorder == "little" and array("i").itemsize == 4


def pack_int32(values: Iterable[int]) -> bytes:
    """Integers as little-endian int32 bytes."""
    return array("i", values).tobytes()


def unpack_int32(data: bytes) -> "array[int]":
    """The reverse of `pack_int32`."""
    values = array("i")
    values.frombytes(data)
    return values


class Sampling(msgspec.Struct, frozen=True, array_like=True):
    """How the next token of a row is chosen. Travels once, in the row's `Join`.

    Order of application: penalties, `logit_bias` and the `min_tokens` mask; then temperature,
    top-k, top-p, min-p; then Gumbel noise keyed by (seed, position, token). `temperature == 0`
    is the argmax. Log-probabilities are those of the unmodified logits.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0: off."""
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    """64 bits, unsigned."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    masked_token_ids: tuple[int, ...] = ()
    """Never chosen while fewer than `min_tokens` tokens have been generated."""
    num_logprobs: int = -1
    """How many best alternatives to report with each token; 0: only the chosen one; -1: none."""
    num_prompt_logprobs: int = -1
    """The same for each prompt token but the first."""


class Join(msgspec.Struct, frozen=True, array_like=True):
    """Creates a row: for admission, after preemption, and for replay."""

    row: int
    token_ids: bytes
    """int32: the prompt, then what has been generated so far."""
    num_prompt_tokens: int
    num_cached_tokens: int
    """The first so many tokens have their KV in `block_table` already."""
    block_table: tuple[int, ...]
    sampling: Sampling


class Grow(msgspec.Struct, frozen=True, array_like=True):
    """Appends blocks to a row's block table."""

    row: int
    block_ids: tuple[int, ...]


class Chunk(msgspec.Struct, frozen=True, array_like=True):
    """A slice of a row's prompt to compute in this step."""

    row: int
    start: int
    num_tokens: int
    sample: bool
    """True for the last chunk: the step samples the row's next token."""


Copies = tuple[tuple[int, int], ...]
"""(from, to) of whole KV blocks, all layers of them."""


class Step(msgspec.Struct, frozen=True, array_like=True, tag="step"):
    """One forward pass. The worker obeys; it never re-decides.

    `offloads`, then `restores`, then `joins`, then `grows` are applied, each in order. Then every
    row of `decodes` computes its one newest token and every chunk its slice. Tokens are sampled for
    all `decodes`, then for each chunk with `sample`, in this order.

    With drafts, a row of n tokens computes [newest, draft 1 .. draft num_drafts] at positions
    n - 1 .. n - 1 + num_drafts; its drafts are accepted up to the first that is not what is chosen
    there, and the token chosen after the last accepted one is a token too. Whatever is sampled is
    then followed by `num_next_drafts` new drafts; the draft layer computes its own KV of every new
    token even if that is 0.

    An offload reads its block before anything of this step writes there, and the copies of a step
    are made before those of the next. They need not wait for the steps before this one that are
    still being computed: none of those writes a block that is offloaded here, or reads or writes a
    block that is restored into. A step offloads to a slot at most once, and to none whose earlier
    content it restores.
    """

    epoch: int
    seq: int
    mode: str
    """"decode" (only `decodes`), "prefill" (only `chunks`) or "mixed"."""
    padded_size: int
    """Rows that a captured decode graph runs for; the same on every attention-DP rank."""
    joins: tuple[Join, ...]
    grows: tuple[Grow, ...]
    decodes: bytes
    """int32 rows."""
    chunks: tuple[Chunk, ...]
    num_drafts: int = 0
    """Of each row of `decodes`; at most the `num_next_drafts` of the step before."""
    num_next_drafts: int = 0
    offloads: Copies = ()
    """(block, slot of the host cache)."""
    restores: Copies = ()
    """(slot of the host cache, block)."""


class LogprobEntry(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities at one position, natural logarithm."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """(token id, logprob), best first."""


class StepOutput(msgspec.Struct, frozen=True, array_like=True, tag="step_output"):
    """What one step produced."""

    epoch: int
    seq: int
    token_ids: bytes
    """int32, those of each sampled row, in the order that `Step` defines."""
    logprobs: dict[int, LogprobEntry] = {}
    """By index into `token_ids`; only rows that asked."""
    prompt_logprobs: dict[int, tuple[LogprobEntry, ...]] = {}
    """By index into `Step.chunks`: entries for the prompt tokens after each of the chunk's."""
    compute_us: int = 0
    """That the step took on the device."""
    idle_us: int = 0
    """That the device stood idle between the step before and this one."""
    num_tokens: bytes = b""
    """int32: how many of `token_ids` each sampled row has, 1 to num_drafts + 1 for a row of
    `decodes`, one for a chunk; empty: one each."""


class Hello(msgspec.Struct, frozen=True, array_like=True, tag="hello"):
    """First message of a worker."""

    protocol: int
    pid: int
    rank: int


class Load(msgspec.Struct, frozen=True, array_like=True, tag="load"):
    """What to load and how."""

    epoch: int
    model_dir: str
    device: str
    """"auto", "cpu" or "cuda"."""
    dtype: str
    """Of activations and KV: "auto" (the checkpoint's), "float32" or "bfloat16"."""
    act_quant: str
    """"auto": "fp8" on a GPU, else "none". "none": fp8 weights are dequantised as they are used;
    "fp8": activations are quantised 1x128 and multiplied in fp8, exactly as on a GPU."""
    max_batch_size: int
    """0, here and in the next: chosen for the device."""
    max_num_tokens: int
    max_seq_len: int
    """0: the model's own limit."""
    block_size: int
    kv_cache_gb: float
    """Size of the KV cache in GB; 0: chosen from the free memory."""
    kv_cache_free_gpu_memory_fraction: float
    load_format: str = "auto"
    """"auto": the checkpoint's safetensors; "dummy": random weights, no file but config.json."""
    use_cuda_graph: bool = True
    cuda_graph_batch_sizes: tuple[int, ...] = ()
    """Empty: chosen here."""
    tp_size: int = 1
    """The next three too: the layout that the worker's rank is a part of."""
    ep_size: int = 1
    pp_size: int = 1
    attention_dp: bool = False
    kv_cache_dtype: str = "auto"
    """"auto": as the checkpoint says, else the activations'; "fp8"."""
    check_numerics: bool = False
    """Every pass is checked for NaN, eagerly."""
    fp8_gemm: str = "auto"
    """"auto" or "triton": our kernels; "torch": cuBLASLt's for dense maps."""
    num_nextn: int = 0
    """Most tokens that the MTP layer drafts for a row in one step; 0: it is not loaded."""
    kv_host_cache_gb: float = 0.0
    """Host memory for KV blocks that the GPU has no room for, in GB; 0: none."""
    relaxed_topk: int = 0
    """While a row thinks, a draft among so many best tokens is accepted; 0: only the choice is."""
    relaxed_delta: float = 0.0
    """How much less likely than the best token such a draft may be."""
    tp_rank: int = 0
    pp_rank: int = 0
    """The worker's place in the layout."""


class Progress(msgspec.Struct, frozen=True, array_like=True, tag="progress"):
    """Where a load stands, for people and for systemd's STATUS."""

    epoch: int
    stage: str
    """"loading", "building", "compiling" (passes that try every kernel), "capturing" (graphs) or
    "pinning" (host memory for KV blocks)."""
    done: int
    total: int
    """Bytes while loading weights or pinning memory; 0: nothing to count."""


class Ready(msgspec.Struct, frozen=True, array_like=True, tag="ready"):
    """The worker can take steps."""

    epoch: int
    device: str
    dtype: str
    vocab_size: int
    max_batch_size: int
    max_num_tokens: int
    max_seq_len: int
    num_blocks: int
    """Usable blocks are 1 ... num_blocks - 1; block 0 is the null block."""
    block_size: int
    num_parameters: int
    weight_bytes: int
    notes: tuple[str, ...] = ()
    """What was chosen and why, a sentence each."""
    graph_batch_sizes: tuple[int, ...] = ()
    """Sizes of decode steps that `Step.padded_size` may name for a captured graph."""
    num_nextn: int = 0
    """Most drafts that a `Step` may ask for."""
    num_host_blocks: int = 0
    """Slots of the host cache: 0 ... num_host_blocks - 1."""


class Failed(msgspec.Struct, frozen=True, array_like=True, tag="failed"):
    """The worker cannot go on; it exits after this."""

    epoch: int
    message: str
    """One sentence for a person."""
    user_error: bool
    """True: the checkpoint or configuration is at fault; starting again will not help."""


class Stop(msgspec.Struct, frozen=True, array_like=True, tag="stop"):
    """Finish the steps at hand and exit."""

    epoch: int


ToWorker = Load | Step | Stop
FromWorker = Hello | Progress | Ready | Failed | StepOutput
