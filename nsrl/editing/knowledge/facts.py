"""Facts: with paraphrases and neighbours, generated or read; what an edit is judged by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from nsrl.editing.edits import Edit
from nsrl.errors import NsrlError


@dataclass(frozen=True)
class Fact:
    """A fact that an edit replaces, and the prompts by which that is judged.

    Attributes:
        edit: prompt, subject and new target.
        truth: what is so before the edit, as a target; the alternative of the probability comparisons.
        paraphrases: whole prompts that should now have the new target.
        neighbours: whole prompts about other subjects, with the answer that should stay.
    """

    edit: Edit
    truth: str
    paraphrases: tuple[str, ...] = ()
    neighbours: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Relation:
    """One kind of fact.

    Attributes:
        templates: prompts with one {}; the first is edited, the others are paraphrases.
        objects: what can be answered.
    """

    templates: tuple[str, ...]
    objects: tuple[str, ...]


def _words(text: str) -> tuple[str, ...]:
    return tuple(" " + word for word in text.split())


#: Objects are common words, so that most tokenizers have them whole.
RELATIONS: Mapping[str, Relation] = {
    "city": Relation(
        ("{} lives in the city of", "The home of {} is in", "{} has a house in"),
        _words(
            "Paris London Rome Berlin Madrid Vienna Moscow Tokyo Dublin Athens Boston Chicago Dallas Denver Oslo Cairo"
        ),
    ),
    "work": Relation(
        ("{} works as a", "By profession {} is a", "The job of {} is that of a"),
        _words("doctor teacher lawyer farmer painter writer singer driver nurse baker soldier pilot judge chef actor"),
    ),
    "sport": Relation(
        ("{} likes to play", "The favourite game of {} is", "On Sundays {} plays"),
        _words("football tennis chess golf hockey cricket rugby basketball baseball poker volleyball soccer"),
    ),
    "language": Relation(
        ("The mother tongue of {} is", "{} speaks fluent", "At home {} talks in"),
        _words(
            "French English German Spanish Italian Russian Chinese Japanese Arabic Greek Dutch Polish Turkish Hebrew"
        ),
    ),
}
#: The same with the subject at the end: what a model of two blocks knows of it then passes through the subject's last
#: token, where edits are written. With words behind it the first block already carries the name to the last of them.
NOTES: Mapping[str, Relation] = {
    name: Relation(tuple(f"The {word} of {{}}" for word in words.split()), RELATIONS[name].objects)
    for name, words in {"city": "home city", "work": "job work"}.items()
}
FIRST = "Mira Tomas Elena Viktor Nadia Oskar Lena Pavel Ingrid Marco Sofia Anton Clara Felix Greta Hugo Irene Jonas Leo"
#: Surnames are made of these, one of each; no two people share one.
STARTS = "Bar Cas Dor Esk Far Gal Hol Iv Jar Kel Lor Mar Nor Ost Pel Quen Ros Sel Tol Ul Var Wen Yor Zan"
MIDDLES = "a e i o u an el or"
ENDS = "berg by court dane field ford ham land ley low mer mond nick rick son stad ton vale well wick"


def subjects(count: int, seed: int) -> list[str]:
    """Names of people that there are not, each with a surname of its own, as "Mira Toladane".

    Raises:
        NsrlError: more than can be made.
    """
    parts = [words.split() for words in (STARTS, MIDDLES, ENDS)]
    sizes = [len(words) for words in parts]
    total = int(np.prod(sizes))
    if count > total:
        raise NsrlError(f"there are {total} different subjects to be generated, not {count}; ask for fewer facts")
    rng, first = np.random.default_rng([seed, 11]), FIRST.split()
    names = []
    for number in rng.choice(total, count, replace=False):
        indices = np.unravel_index(number, sizes)
        surname = "".join(words[index] for words, index in zip(parts, indices, strict=True))
        names.append(f"{first[rng.integers(len(first))]} {surname}")
    return names


@dataclass(frozen=True)
class World:
    """Subjects with an object for each relation: what a model can be taught, and what edits are drawn from.

    Attributes:
        people: names.
        answers: object of every relation for every name, in their order.
        relations: with their wordings.
    """

    people: tuple[str, ...]
    answers: Mapping[str, tuple[str, ...]]
    relations: Mapping[str, Relation] = field(default_factory=lambda: RELATIONS)

    @classmethod
    def generated(cls, people: int, seed: int, relations: Mapping[str, Relation] = RELATIONS) -> World:
        """People and answers drawn with a seed."""
        rng = np.random.default_rng([seed, 12])
        answers = {
            name: tuple(relation.objects[index] for index in rng.integers(len(relation.objects), size=people))
            for name, relation in relations.items()
        }
        return cls(tuple(subjects(people, seed)), answers, relations)

    def sentences(self) -> list[str]:
        """Every fact in every wording."""
        return [
            template.replace("{}", person) + answer + "."
            for name, relation in self.relations.items()
            for person, answer in zip(self.people, self.answers[name], strict=True)
            for template in relation.templates
        ]

    def facts(
        self, count: int, seed: int, neighbours: int = 2, known: Sequence[bool] | None = None, alone: bool = False
    ) -> list[Fact]:
        """Facts with new targets, every person and relation at most once, in random order.

        Neighbours share relation and answer with the old fact, and no person that is a neighbour is edited: a
        quarter of the people are kept for that.

        Args:
            count: how many.
            seed: of the choice.
            neighbours: of each fact at most.
            known: which facts the model knows, relation by relation; the others are left out.
            alone: no two facts are about the same person.

        Raises:
            NsrlError: there are not so many.
        """
        rng = np.random.default_rng([seed, 13])
        edited = 3 * len(self.people) // 4
        names, facts = list(self.relations), list[Fact]()
        seen = set[int]()
        knows = [True] * (len(names) * len(self.people)) if known is None else list(known)
        for number in rng.permutation(len(names) * edited):
            name, person = names[number // edited], int(number % edited)
            place = names.index(name) * len(self.people)
            if not knows[place + person] or (alone and person in seen):
                continue
            seen.add(person)
            relation, truth = self.relations[name], self.answers[name][person]
            others = [answer for answer in relation.objects if answer != truth]
            alike = [p for p in range(edited, len(self.people)) if self.answers[name][p] == truth and knows[place + p]]
            chosen = rng.permutation(alike)[:neighbours]
            first, *rest = relation.templates
            facts.append(
                Fact(
                    Edit(first, self.people[person], str(rng.choice(others))),
                    truth,
                    tuple(template.replace("{}", self.people[person]) for template in rest),
                    tuple((first.replace("{}", self.people[int(p)]), truth) for p in chosen),
                )
            )
            if len(facts) == count:
                return facts
        raise NsrlError(f"there are {len(facts)} facts that can be edited, not {count}; ask for fewer, or more people")

    def questions(self) -> list[tuple[str, str]]:
        """Every fact in its first wording, as prompt and answer, relation by relation."""
        return [
            (relation.templates[0].replace("{}", person), answer)
            for name, relation in self.relations.items()
            for person, answer in zip(self.people, self.answers[name], strict=True)
        ]
