"""Writes the bundled sample data: short word problems in plain English, made by this script and free to use (CC0).

    python examples/sample_data.py QEfficient/finetune/samples/arithmetic.jsonl

Every row is ``{"question": ..., "answer": ...}``; the answer explains each sum on its own line and ends in
``#### <number>``, the form the demo model was trained on. Sentences and numbers are drawn from the lists below with a
fixed seed, so the file is the same wherever it is made.
"""

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path

ROWS = 480
SEED = 20240

NAMES = [
    *("Anna", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Henry", "Ida", "Jack", "Kim", "Leo", "Maria", "Nora"),
    *("Oscar", "Paula", "Quinn", "Rosa", "Sam", "Tina", "Victor", "Wendy"),
]
THINGS = ["apples", "books", "pencils", "stickers", "marbles", "cookies", "cards", "stamps", "shells", "coins"]
CONTAINERS = ["boxes", "bags", "baskets", "jars", "shelves", "crates"]
JOBS = ["washing cars", "walking dogs", "cutting grass", "painting fences", "selling lemonade", "delivering papers"]

Problem = tuple[str, str]


def boxes(draw: random.Random) -> Problem:
    name, thing, box = draw.choice(NAMES), draw.choice(THINGS), draw.choice(CONTAINERS)
    count, each = draw.randint(2, 9), draw.randint(3, 12)
    lost = draw.randint(2, each)
    total = count * each
    return (
        f"{name} has {count} {box} with {each} {thing} in each of them. {name} gives away {lost} {thing}. "
        f"How many {thing} does {name} have left?",
        f"{name} has {count} * {each} = {total} {thing} at first.\n"
        f"After giving some away, {name} has {total} - {lost} = {total - lost} {thing}.\n#### {total - lost}",
    )


def wages(draw: random.Random) -> Problem:
    name, job = draw.choice(NAMES), draw.choice(JOBS)
    rate, hours, days = draw.randint(5, 15), draw.randint(2, 8), draw.randint(2, 6)
    daily = rate * hours
    return (
        f"{name} earns ${rate} an hour {job}. {name} works {hours} hours a day for {days} days. "
        f"How many dollars does {name} earn?",
        f"{name} earns {rate} * {hours} = ${daily} a day.\n"
        f"In {days} days {name} earns {daily} * {days} = ${daily * days}.\n#### {daily * days}",
    )


def together(draw: random.Random) -> Problem:
    (first, second), thing = draw.sample(NAMES, 2), draw.choice(THINGS)
    count, more = draw.randint(4, 30), draw.randint(2, 20)
    other = count + more
    return (
        f"{first} has {count} {thing}. {second} has {more} more {thing} than {first}. "
        f"How many {thing} do they have together?",
        f"{second} has {count} + {more} = {other} {thing}.\n"
        f"Together they have {count} + {other} = {count + other} {thing}.\n#### {count + other}",
    )


def times(draw: random.Random) -> Problem:
    (first, second), thing = draw.sample(NAMES, 2), draw.choice(THINGS)
    count, factor = draw.randint(3, 15), draw.randint(2, 5)
    other = count * factor
    return (
        f"{first} found {count} {thing}. {second} found {factor} times as many {thing} as {first}. "
        f"How many {thing} did they find in total?",
        f"{second} found {count} * {factor} = {other} {thing}.\n"
        f"In total they found {count} + {other} = {count + other} {thing}.\n#### {count + other}",
    )


def shop(draw: random.Random) -> Problem:
    name, thing = draw.choice(NAMES), draw.choice(THINGS)
    count, price = draw.randint(2, 9), draw.randint(2, 8)
    cost = count * price
    money = cost + draw.randint(1, 30)
    return (
        f"{name} buys {count} {thing} for ${price} each and pays with ${money}. How many dollars does {name} get back?",
        f"The {thing} cost {count} * {price} = ${cost}.\n"
        f"{name} gets back {money} - {cost} = ${money - cost}.\n#### {money - cost}",
    )


def shares(draw: random.Random) -> Problem:
    name, thing = draw.choice(NAMES), draw.choice(THINGS)
    friends, each = draw.randint(2, 8), draw.randint(2, 12)
    total, kept = friends * each, draw.randint(1, 10)
    return (
        f"{name} has {total + kept} {thing}. {name} keeps {kept} {thing} and shares the rest equally among {friends} "
        f"friends. How many {thing} does each friend get?",
        f"{name} shares {total + kept} - {kept} = {total} {thing}.\n"
        f"Each friend gets {total} / {friends} = {each} {thing}.\n#### {each}",
    )


def pages(draw: random.Random) -> Problem:
    name = draw.choice(NAMES)
    daily, days = draw.randint(5, 25), draw.randint(2, 7)
    read = daily * days
    left = draw.randint(5, 60)
    return (
        f"{name} reads {daily} pages of a book every day. The book has {read + left} pages. "
        f"How many pages are left after {days} days?",
        f"In {days} days {name} reads {daily} * {days} = {read} pages.\n"
        f"There are {read + left} - {read} = {left} pages left.\n#### {left}",
    )


def trip(draw: random.Random) -> Problem:
    name = draw.choice(NAMES)
    speed, hours, more = draw.randint(20, 60), draw.randint(2, 5), draw.randint(5, 40)
    way = speed * hours
    return (
        f"{name} drives {speed} miles an hour for {hours} hours and then another {more} miles. "
        f"How many miles does {name} drive?",
        f"{name} drives {speed} * {hours} = {way} miles at first.\n"
        f"In all {name} drives {way} + {more} = {way + more} miles.\n#### {way + more}",
    )


PROBLEMS: list[Callable[[random.Random], Problem]] = [boxes, wages, together, times, shop, shares, pages, trip]


def rows(count: int = ROWS, seed: int = SEED) -> list[dict[str, str]]:
    """``count`` different problems."""
    draw = random.Random(seed)
    found: dict[str, str] = {}
    while len(found) < count:
        question, answer = PROBLEMS[len(found) % len(PROBLEMS)](draw)
        found.setdefault(question, answer)
    return [{"question": question, "answer": answer} for question, answer in found.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the bundled sample data.")
    parser.add_argument("output", type=Path, help="file to write, one JSON object a line")
    lines = (json.dumps(row, ensure_ascii=True) + "\n" for row in rows())
    parser.parse_args().output.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
