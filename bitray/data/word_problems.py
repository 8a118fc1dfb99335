"""Arithmetic word problems with worked answers, generated: small, varied, and always right."""

import random
from collections.abc import Callable, Iterator
from typing import NamedTuple


class Problem(NamedTuple):
    """A question, the sentences that work it out, and the result."""

    question: str
    steps: tuple[str, ...]
    answer: int

    def __str__(self) -> str:
        return f"Question: {self.question}\nAnswer: {' '.join(self.steps)}\n#### {self.answer}\n"


NAMES = (
    "Ada", "Amir", "Bella", "Carlos", "Chen", "Dana", "Elif", "Emma", "Farid", "Grace", "Hana",
    "Hugo", "Ines", "Ivan", "Jonas", "Kofi", "Lea", "Liam", "Mara", "Mei", "Nadia", "Noah",
    "Olga", "Omar", "Paul", "Priya", "Rosa", "Sam", "Sofia", "Tariq", "Uma", "Victor", "Wen",
    "Yara", "Zoe",
)  # fmt: skip
THINGS = (
    "apples", "books", "buttons", "candles", "cards", "coins", "cookies", "eggs", "flowers",
    "lemons", "marbles", "muffins", "nails", "oranges", "pencils", "plums", "shells", "stamps",
    "stickers", "stones",
)  # fmt: skip
BOXES = ("bags", "baskets", "boxes", "crates", "drawers", "jars", "shelves", "trays")
SHOPS = ("bakery", "bookshop", "corner shop", "garden centre", "market", "stationer")
WORK = (
    "folds letters", "paints fence posts", "peels potatoes", "picks berries", "plants bulbs",
    "reads pages", "sews patches", "washes plates",
)  # fmt: skip


def word_problems(seed: int = 0) -> Iterator[str]:
    """An endless, seeded sequence of problems; one in a hundred has been there before."""
    rng = random.Random(seed)
    while True:
        yield str(rng.choice(KINDS)(rng))


def _two(rng: random.Random) -> tuple[str, str]:
    first, second = rng.sample(NAMES, 2)
    return first, second


def _spend_and_earn(rng: random.Random) -> Problem:
    name, other = _two(rng)
    thing = rng.choice(THINGS)
    have, gets = rng.randint(20, 150), rng.randint(5, 90)
    gives = rng.randint(3, have - 5)
    left = have - gives
    return Problem(
        f"{name} has {have} {thing}. {name} gives {gives} of them to {other} and then finds {gets} "
        f"more. How many {thing} does {name} have now?",
        (
            f"After giving {gives} away, {name} has {have} - {gives} = {left} {thing}.",
            f"Finding {gets} more makes {left} + {gets} = {left + gets}.",
        ),
        left + gets,
    )


def _boxes(rng: random.Random) -> Problem:
    name, thing, box = rng.choice(NAMES), rng.choice(THINGS), rng.choice(BOXES)
    boxes, each, extra = rng.randint(3, 15), rng.randint(4, 25), rng.randint(1, 30)
    full = boxes * each
    return Problem(
        f"{name} fills {boxes} {box} with {each} {thing} each and has {extra} {thing} left over. "
        f"How many {thing} are there altogether?",
        (
            f"The {box} hold {boxes} * {each} = {full} {thing}.",
            f"With the ones left over there are {full} + {extra} = {full + extra}.",
        ),
        full + extra,
    )


def _sharing(rng: random.Random) -> Problem:
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    friends, each, eaten = rng.randint(3, 12), rng.randint(3, 20), rng.randint(2, 15)
    left = friends * each
    return Problem(
        f"{name} buys {left + eaten} {thing}, keeps {eaten} and shares the rest equally among "
        f"{friends} friends. How many {thing} does each friend get?",
        (
            f"{name} shares {left + eaten} - {eaten} = {left} {thing}.",
            f"Each of the {friends} friends gets {left} / {friends} = {each}.",
        ),
        each,
    )


def _shopping(rng: random.Random) -> Problem:
    name, shop = rng.choice(NAMES), rng.choice(SHOPS)
    first, second = rng.sample(THINGS, 2)
    many, price, more, cost = (rng.randint(2, 12) for _ in range(4))
    total = many * price + more * cost
    paid = (total // 50 + 1) * 50
    return Problem(
        f"At the {shop} {name} buys {many} {first} for {price} dollars each and {more} {second} "
        f"for {cost} dollars each, and pays with {paid} dollars. How much change does {name} get?",
        (
            f"The {first} cost {many} * {price} = {many * price} dollars.",
            f"The {second} cost {more} * {cost} = {more * cost} dollars.",
            f"Together that is {many * price} + {more * cost} = {total} dollars.",
            f"The change is {paid} - {total} = {paid - total} dollars.",
        ),
        paid - total,
    )


def _travel(rng: random.Random) -> Problem:
    name = rng.choice(NAMES)
    slow, hours, fast, later = (
        rng.randint(3, 40), rng.randint(2, 6), rng.randint(41, 90), rng.randint(2, 5),
    )  # fmt: skip
    first, second = slow * hours, fast * later
    return Problem(
        f"{name} travels {hours} hours at {slow} km per hour and then {later} hours at {fast} km "
        f"per hour. How many kilometres is that in all?",
        (
            f"The first part is {hours} * {slow} = {first} km.",
            f"The second part is {later} * {fast} = {second} km.",
            f"In all that is {first} + {second} = {first + second} km.",
        ),
        first + second,
    )


def _ages(rng: random.Random) -> Problem:
    young, old = _two(rng)
    age, gap, years = rng.randint(4, 30), rng.randint(2, 40), rng.randint(2, 20)
    return Problem(
        f"{young} is {age} years old. {old} is {gap} years older. How old will {old} be in {years} "
        f"years?",
        (
            f"{old} is {age} + {gap} = {age + gap} years old now.",
            f"In {years} years {old} will be {age + gap} + {years} = {age + gap + years}.",
        ),
        age + gap + years,
    )


def _rates(rng: random.Random) -> Problem:
    name, work = rng.choice(NAMES), rng.choice(WORK)
    verb, noun = work.split(" ", 1)
    rate, hours, needed = rng.randint(4, 30), rng.randint(2, 8), rng.randint(5, 60)
    done = rate * hours
    return Problem(
        f"{name} {verb} {rate} {noun} an hour. After {hours} hours {needed} more are still to do. "
        f"How many {noun} were there at the start?",
        (
            f"In {hours} hours {name} has done {hours} * {rate} = {done} {noun}.",
            f"At the start there were {done} + {needed} = {done + needed}.",
        ),
        done + needed,
    )


def _times_as_many(rng: random.Random) -> Problem:
    name, other = _two(rng)
    thing = rng.choice(THINGS)
    times, few = rng.randint(2, 9), rng.randint(3, 40)
    many = times * few
    return Problem(
        f"{name} has {few} {thing}. {other} has {times} times as many. How many {thing} do they "
        f"have together?",
        (
            f"{other} has {times} * {few} = {many} {thing}.",
            f"Together they have {few} + {many} = {few + many}.",
        ),
        few + many,
    )


def _saving(rng: random.Random) -> Problem:
    name = rng.choice(NAMES)
    week, start, weeks = rng.randint(3, 25), rng.randint(5, 60), rng.randint(3, 20)
    goal = start + week * weeks
    return Problem(
        f"{name} has {start} dollars and saves {week} dollars every week. After how many weeks "
        f"does {name} have {goal} dollars?",
        (
            f"{name} still needs {goal} - {start} = {goal - start} dollars.",
            f"That takes {goal - start} / {week} = {weeks} weeks.",
        ),
        weeks,
    )


def _halves(rng: random.Random) -> Problem:
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    half, sold = rng.randint(12, 80), rng.randint(3, 11)
    return Problem(
        f"{name} had {2 * half} {thing}, sold half of them on Monday and {sold} more on Tuesday. "
        f"How many {thing} were left?",
        (
            f"On Monday {name} sold {2 * half} / 2 = {half} {thing}, so {half} were left.",
            f"After Tuesday {half} - {sold} = {half - sold} were left.",
        ),
        half - sold,
    )


def _rows_of_seats(rng: random.Random) -> Problem:
    rows, seats, taken = rng.randint(5, 25), rng.randint(6, 30), rng.randint(5, 29)
    total = rows * seats
    place = rng.choice(("hall", "cinema", "tent", "classroom", "theatre", "bus depot"))
    return Problem(
        f"A {place} has {rows} rows of {seats} seats. {taken} seats are taken. How many are free?",
        (
            f"There are {rows} * {seats} = {total} seats.",
            f"Free are {total} - {taken} = {total - taken}.",
        ),
        total - taken,
    )


def _average(rng: random.Random) -> Problem:
    name = rng.choice(NAMES)
    mean = rng.randint(10, 60)
    spread = rng.randint(1, 9)
    middle = mean + rng.randint(-5, 5)
    scores = (mean - spread, middle, 2 * mean + spread - middle)
    total = sum(scores)
    return Problem(
        f"{name} scored {scores[0]}, {scores[1]} and {scores[2]} points in three games. What is "
        f"the average?",
        (
            f"The sum is {scores[0]} + {scores[1]} + {scores[2]} = {total}.",
            f"The average is {total} / 3 = {mean}.",
        ),
        mean,
    )


def _sum(rng: random.Random) -> Problem:
    a, b = rng.randint(2, 400), rng.randint(2, 400)
    return Problem(f"What is {a} + {b}?", (f"{a} + {b} = {a + b}.",), a + b)


def _difference(rng: random.Random) -> Problem:
    a, b = rng.randint(2, 400), rng.randint(2, 400)
    return Problem(f"What is {a + b} - {a}?", (f"{a + b} - {a} = {b}.",), b)


def _product(rng: random.Random) -> Problem:
    a, b = rng.randint(2, 30), rng.randint(2, 30)
    tens, ones = b - b % 10, b % 10
    if not tens or not ones:
        return Problem(f"What is {a} * {b}?", (f"{a} * {b} = {a * b}.",), a * b)
    return Problem(
        f"What is {a} * {b}?",
        (
            f"{a} * {tens} = {a * tens} and {a} * {ones} = {a * ones}.",
            f"{a * tens} + {a * ones} = {a * b}.",
        ),
        a * b,
    )


KINDS: tuple[Callable[[random.Random], Problem], ...] = (
    _spend_and_earn, _boxes, _sharing, _shopping, _travel, _ages, _rates, _times_as_many, _saving,
    _halves, _rows_of_seats, _average, _sum, _difference, _product,
)  # fmt: skip
