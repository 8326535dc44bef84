"""Write was_fx/plugins/tasks/minimal_pairs.jsonl: 200 pairs of English sentences that differ in one point of grammar.

    python scripts/make_minimal_pairs.py

Eight phenomena with 25 pairs each, from templates and word lists that were written for was-fx (CC0). The same file
every time: a seed decides which combinations are taken.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path

PAIRS = 25
TARGET = Path(__file__).resolve().parent.parent / "was_fx" / "tasks" / "minimal_pairs.jsonl"

PEOPLE = {
    "doctor": "doctors", "soldier": "soldiers", "servant": "servants", "sailor": "sailors", "traveller": "travellers",
    "farmer": "farmers", "lawyer": "lawyers", "stranger": "strangers", "neighbour": "neighbours", "child": "children",
}  # fmt: skip
THINGS = {
    "house": "houses", "letter": "letters", "garden": "gardens", "horse": "horses", "river": "rivers",
    "tree": "trees", "window": "windows", "ship": "ships", "field": "fields", "knife": "knives",
}  # fmt: skip
# third person singular, plain form
VERBS = {"walks": "walk", "sleeps": "sleep", "waits": "wait", "works": "work", "listens": "listen", "smiles": "smile"}
# simple past, participle, object
STRONG = [
    ("wrote", "written", "the letter"), ("broke", "broken", "the window"), ("took", "taken", "the money"),
    ("saw", "seen", "the river"), ("gave", "given", "the answer"), ("chose", "chosen", "the book"),
    ("stole", "stolen", "the horse"), ("knew", "known", "the truth"),
]  # fmt: skip
PLACES = ["near the church", "behind the hill", "in the village", "on the road", "beside the river"]
WHEN = ["this evening", "every morning", "after dinner", "before the war", "in the winter"]
MEN = ["John", "George", "Henry", "Charles", "the king", "the old man"]
WOMEN = ["Mary", "Anne", "Elizabeth", "Margaret", "the queen", "the old woman"]

Pair = tuple[str, str]
Draw = random.Random


def pick(draw: Draw, words: dict[str, str]) -> Pair:
    return draw.choice(sorted(words.items()))


def subject_verb_agreement(draw: Draw) -> Pair:
    one, many = pick(draw, PEOPLE)
    singular, plural = pick(draw, VERBS)
    place = draw.choice(PLACES)
    if draw.random() < 0.5:
        return f"The {one} {singular} {place}.", f"The {one} {plural} {place}."
    return f"The {many} {plural} {place}.", f"The {many} {singular} {place}."


def agreement_across_a_phrase(draw: Draw) -> Pair:
    one, many = pick(draw, PEOPLE)
    _, things = pick(draw, THINGS)
    other, _ = pick(draw, THINGS)
    if draw.random() < 0.5:
        return f"The {one} with the {things} was very old.", f"The {one} with the {things} were very old."
    return f"The {many} with the {other} were very old.", f"The {many} with the {other} was very old."


def determiner_noun_agreement(draw: Draw) -> Pair:
    person = draw.choice(sorted(PEOPLE))
    one, many = pick(draw, THINGS)
    if draw.random() < 0.5:
        determiner = draw.choice(["this", "that"])
        return f"The {person} looked at {determiner} {one}.", f"The {person} looked at {determiner} {many}."
    determiner = draw.choice(["these", "those"])
    return f"The {person} looked at {determiner} {many}.", f"The {person} looked at {determiner} {one}."


def reflexive_gender(draw: Draw) -> Pair:
    verb = draw.choice(["asked", "blamed", "hurt", "praised", "dressed", "deceived"])
    when = draw.choice(WHEN)
    man = draw.random() < 0.5
    name = draw.choice(MEN if man else WOMEN)
    name = name[0].upper() + name[1:]
    good, bad = ("himself", "herself") if man else ("herself", "himself")
    return f"{name} {verb} {good} {when}.", f"{name} {verb} {bad} {when}."


def participle(draw: Draw) -> Pair:
    past, done, thing = draw.choice(STRONG)
    person = draw.choice(sorted(PEOPLE))
    return f"The {person} had {done} {thing}.", f"The {person} had {past} {thing}."


def negative_polarity(draw: Draw) -> Pair:
    many = draw.choice(sorted(PEOPLE.values()))
    what = draw.choice(["come home", "spoken of it", "been to London", "read the book", "seen the sea"])
    return f"No {many} have ever {what}.", f"The {many} have ever {what}."


def pronoun_case(draw: Draw) -> Pair:
    verb = draw.choice(["saw", "met", "followed", "knew", "loved", "heard"])
    one = draw.choice(sorted(PEOPLE))
    good, bad = draw.choice([("him", "he"), ("her", "she"), ("them", "they"), ("me", "I")])
    place = draw.choice(PLACES)
    return f"The {one} {verb} {good} {place}.", f"The {one} {verb} {bad} {place}."


def verb_after_modal(draw: Draw) -> Pair:
    singular, plain = pick(draw, VERBS)
    modal = draw.choice(["must", "will", "can", "should", "could not"])
    one = draw.choice(sorted(PEOPLE))
    place = draw.choice(PLACES)
    return f"The {one} {modal} {plain} {place}.", f"The {one} {modal} {singular} {place}."


PHENOMENA: list[Callable[[Draw], Pair]] = [
    subject_verb_agreement,
    agreement_across_a_phrase,
    determiner_noun_agreement,
    reflexive_gender,
    participle,
    negative_polarity,
    pronoun_case,
    verb_after_modal,
]


def main() -> None:
    draw = random.Random(0)
    lines = []
    for phenomenon in PHENOMENA:
        pairs: dict[Pair, None] = {}
        while len(pairs) < PAIRS:
            pairs[phenomenon(draw)] = None
        for good, bad in pairs:
            lines.append(json.dumps({"sentence_good": good, "sentence_bad": bad, "UID": phenomenon.__name__}))
    TARGET.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{TARGET}: {len(lines)} pairs")


if __name__ == "__main__":
    main()
