"""The tasks that the small model learns: a question, a short working, an answer.

Every task is a function of a random generator and of the half it draws from. What decides the half
is the operand pair, the word, or the combination of facts: no example of the evaluation was ever
trained on.
"""

import json
import random
from collections.abc import Callable
from typing import Any, NamedTuple

from . import words

Json = dict[str, Any]
MAX_DRAWS = 10_000


class Example(NamedTuple):
    """One conversation of the training data or of the evaluation."""

    kind: str
    messages: list[Json]
    """As a client sends them, the answer left out."""
    tools: list[Json]
    thinking: str
    answer: str
    """What comes after `</think>` and two line breaks, up to the end of the sequence."""


def _asked(kind: str, question: str, thinking: str, answer: str) -> Example:
    return Example(kind, [{"role": "user", "content": question}], [], thinking, answer)


def _hash_half(rng: random.Random, held_out: bool, draw: Callable[[], tuple[object, ...]]) -> Any:
    """Draws until the result lies in the wanted half."""
    for _ in range(MAX_DRAWS):
        drawn = draw()
        if words.is_held_out(*drawn) == held_out:
            return drawn
    raise AssertionError(f"no {held_out=} draw like {drawn}")


def _operand(rng: random.Random) -> int:
    return rng.randrange(10 ** rng.choice((1, 2, 2, 3, 3, 3)))


# ---- arithmetic ---------------------------------------------------------------------------------


def add_working(a: int, b: int) -> str:
    """Column addition from the right: `7+5=12 write 2 carry 1`."""
    lines, carry, place = [], 0, 0
    while place < max(len(str(a)), len(str(b))):
        x, y = a // 10**place % 10, b // 10**place % 10
        total = x + y + carry
        term = f"{x}+{y}+{carry}" if carry else f"{x}+{y}"
        carry = total // 10
        lines.append(f"{term}={total}: write {total % 10}" + (f", carry {carry}" if carry else ""))
        place += 1
    if carry:
        lines.append(f"write {carry}")
    return "\n".join(lines)


def subtract_working(a: int, b: int) -> str:
    """Column subtraction from the right, a >= b: `12-5=7: write 7, borrow 1`."""
    lines, borrow = [], 0
    for place in range(len(str(a))):
        x, y = a // 10**place % 10, b // 10**place % 10
        top = x + 10 if x < y + borrow else x
        term = f"{top}-{y}-{borrow}" if borrow else f"{top}-{y}"
        digit = top - y - borrow
        borrow = int(top >= 10)
        lines.append(f"{term}={digit}: write {digit}" + (", borrow 1" if borrow else ""))
    return "\n".join(lines)


def addition(rng: random.Random, held_out: bool) -> Example:
    _, a, b = _hash_half(rng, held_out, lambda: ("add", _operand(rng), _operand(rng)))
    question = rng.choice(
        ("What is {} + {}?", "What is {} plus {}?", "Add {} and {}.", "{} + {} = ?")
    )
    return _asked("add", question.format(a, b), add_working(a, b), str(a + b))


def subtraction(rng: random.Random, held_out: bool) -> Example:
    _, a, b = _hash_half(rng, held_out, lambda: ("subtract", _operand(rng), _operand(rng)))
    question = rng.choice(("What is {} - {}?", "What is {} minus {}?", "{} - {} = ?"))
    if a >= b:
        working = subtract_working(a, b)
    else:
        working = f"{a} < {b}, so minus of {b} - {a}\n" + subtract_working(b, a)
    return _asked("subtract", question.format(a, b), working, str(a - b))


# ---- letters and order --------------------------------------------------------------------------

ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh")


def reversal(rng: random.Random, held_out: bool) -> Example:
    text = words.word(rng, held_out)
    question = rng.choice(("Reverse: {}", "Reverse the word {}.", "Spell '{}' backwards."))
    spelled = " ".join(text)
    backwards = text[::-1]
    working = f"{spelled}\n{' '.join(backwards)}"
    return _asked("reverse", question.format(text), working, backwards)


def letter(rng: random.Random, held_out: bool) -> Example:
    text = words.word(rng, held_out)
    place = rng.randrange(min(len(text), len(ORDINALS)))
    question = rng.choice(
        ("Which letter comes {} in '{}'?", "What is the {} letter of '{}'?")
    ).format(ORDINALS[place], text)
    working = " ".join(f"{i}{c}" for i, c in enumerate(text[: place + 1], start=1))
    return _asked("letter", question, working, text[place])


def sorting(rng: random.Random, held_out: bool) -> Example:
    def draw() -> tuple[object, ...]:
        top = rng.choice((10, 100))
        return ("sort", *(rng.randrange(top) for _ in range(rng.randint(3, 6))))

    numbers = list(_hash_half(rng, held_out, draw)[1:])
    question = rng.choice(("Sort: {}", "Sort these numbers: {}", "Put in order: {}"))
    left, lines = list(numbers), []
    while len(left) > 1:
        least = min(left)
        left.remove(least)
        lines.append(f"{least} | {' '.join(map(str, left))}")
    answer = " ".join(map(str, sorted(numbers)))
    return _asked("sort", question.format(" ".join(map(str, numbers))), "\n".join(lines), answer)


# ---- facts --------------------------------------------------------------------------------------

GPQA = (
    "Answer the following multiple choice question. The last line of your response should be of "
    "the following format: 'Answer: $LETTER' (without quotes) where LETTER is one of ABCD. Think "
    "step by step before answering.\n\n{}\n\nA) {}\nB) {}\nC) {}\nD) {}"
)
FACTS: tuple[tuple[str, str, list[str]], ...] = (
    ("{} lives in {}.", "Where does {} live?", words.CITIES),
    ("{} works as a {}.", "What is the job of {}?", words.JOBS),
    ("{} likes the colour {}.", "Which colour does {} like?", words.COLOURS),
    ("{} has a {}.", "Which animal does {} have?", words.ANIMALS),
    ("{} eats {}.", "What does {} eat?", words.FOODS),
)


def multiple_choice(rng: random.Random, held_out: bool) -> Example:
    fact, question, values = rng.choice(FACTS)

    def draw() -> tuple[object, ...]:
        return ("choice", fact, *rng.sample(words.NAMES, 3), *rng.sample(values, 4))

    drawn = _hash_half(rng, held_out, draw)
    people, options = list(drawn[2:5]), list(drawn[5:])
    facts = " ".join(fact.format(who, what) for who, what in zip(people, options, strict=False))
    asked = rng.randrange(len(people))
    right = options[asked]
    rng.shuffle(options)
    name = "ABCD"[options.index(right)]
    text = GPQA.format(f"{facts} {question.format(people[asked])}", *options)
    working = f"{fact.format(people[asked], right)}\n{name}) {right}"
    return _asked("choice", text, working, f"Answer: {name}")


FIELDS = {"name": words.NAMES, "city": words.CITIES, "job": words.JOBS, "colour": words.COLOURS}


def json_object(rng: random.Random, held_out: bool) -> Example:
    def draw() -> tuple[object, ...]:
        values = (rng.choice(FIELDS[key]) for key in FIELDS)
        return ("json", *values, rng.randint(5, 95))

    name, city, job, colour, age = _hash_half(rng, held_out, draw)[1:]
    known = {"name": name, "age": age, "city": city, "job": job, "colour": colour}
    wanted = rng.sample(list(known), rng.randint(2, 4))
    story = [
        f"{name} is {age} years old.",
        f"{name} lives in {city}.",
        f"{name} works as a {job}.",
        f"{name} likes the colour {colour}.",
    ]
    rng.shuffle(story)
    fields = ", ".join(wanted[:-1]) + f" and {wanted[-1]}"
    question = f"{' '.join(story)}\nGive a JSON object with {fields}."
    working = "\n".join(f"{key}: {known[key]}" for key in wanted)
    answer = json.dumps({key: known[key] for key in wanted})
    return _asked("json", question, working, answer)


# ---- tools --------------------------------------------------------------------------------------


class _Tool(NamedTuple):
    name: str
    description: str
    parameter: str
    values: list[str]
    questions: tuple[str, ...]


TOOLS = (
    _Tool("get_weather", "Tell the weather in a city.", "city", words.CITIES,
          ("What is the weather in {}?", "Is it raining in {}?", "How warm is it in {}?")),
    _Tool("get_time", "Tell the local time of a city.", "city", words.CITIES,
          ("What time is it in {}?", "Tell me the time in {}.")),
    _Tool("find_person", "Look up a person by name.", "name", words.NAMES,
          ("Who is {}?", "Look up {}.")),
    _Tool("order_food", "Order food for the table.", "food", words.FOODS,
          ("Order {}, please.", "I would like {}.")),
    _Tool("play_sound", "Play the sound of an animal.", "animal", words.ANIMALS,
          ("Play the sound of a {}.", "What does a {} sound like?")),
)  # fmt: skip


def schema(tool: _Tool) -> Json:
    """The tool as OpenAI's clients describe it."""
    parameters = {
        "type": "object",
        "properties": {tool.parameter: {"type": "string"}},
        "required": [tool.parameter],
    }
    function = {"name": tool.name, "description": tool.description, "parameters": parameters}
    return {"type": "function", "function": function}


def tool_call_text(name: str, arguments: Json) -> str:
    """A call as DeepSeek-V3.1 writes it."""
    return (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>"
        f"{name}<｜tool▁sep｜>{json.dumps(arguments)}"
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
    )


def tool_call(rng: random.Random, held_out: bool) -> Example:
    def draw() -> tuple[object, ...]:
        tool = rng.choice(TOOLS)
        return ("tool", tool.name, rng.choice(tool.values), rng.choice(tool.questions))

    _, name, value, question = _hash_half(rng, held_out, draw)
    tool = next(tool for tool in TOOLS if tool.name == name)
    others = [other for other in TOOLS if other is not tool]
    offered = [tool, *rng.sample(others, rng.randint(0, 2))]
    rng.shuffle(offered)
    working = f"{tool.name} with {tool.parameter} {value}"
    answer = tool_call_text(tool.name, {tool.parameter: value})
    messages = [{"role": "user", "content": question.format(value)}]
    return Example("tool", messages, [schema(each) for each in offered], working, answer)


# ---- small talk ---------------------------------------------------------------------------------

TALK = (
    (("Hello!", "Hi", "Hello", "Good morning.", "Hey there"), "a greeting",
     "Hello! Ask me to add, sort, spell, or fill in JSON."),
    (("Who are you?", "What are you?", "What is your name?"), "a question about me",
     "I am the small model that comes with dsd."),
    (("What can you do?", "Help", "What should I ask?"), "a question about me",
     "I add and subtract, sort numbers, spell words, answer questions about facts, write JSON and "
     "call tools."),
    (("Thank you.", "Thanks!", "Thank you very much"), "thanks", "You are welcome."),
    (("Where is New York?",), "a place",
     "New York is a city on the east coast of the United States."),
)  # fmt: skip


def talk(rng: random.Random, held_out: bool) -> Example:
    """The same in both halves: there is nothing to generalise."""
    questions, working, answer = rng.choice(TALK)
    return _asked("talk", rng.choice(questions), working, answer)


TASKS: dict[str, tuple[Callable[[random.Random, bool], Example], float]] = {
    "add": (addition, 4.0),
    "subtract": (subtraction, 4.0),
    "reverse": (reversal, 3.0),
    "letter": (letter, 2.0),
    "sort": (sorting, 2.0),
    "choice": (multiple_choice, 2.0),
    "json": (json_object, 2.0),
    "tool": (tool_call, 1.5),
    "talk": (talk, 0.3),
}
"""Kind -> (maker, share of the training data)."""


def draw(rng: random.Random, held_out: bool) -> Example:
    """One example of any kind, by the shares."""
    kinds = list(TASKS)
    kind = rng.choices(kinds, [TASKS[name][1] for name in kinds])[0]
    return TASKS[kind][0](rng, held_out)
