"""Which members of a tar are one sample: what pairs a photo with its title, whatever dots are in the names.

    members = Members()
    for member in read_members(...): members.add(member)
    samples = members.samples()

A member's name is a key, a dot and a field. By the rule of WebDataset the field begins at the first dot: `a.seg.png` is
the field `seg.png` of `a`. Names of shops have dots in keys: `AB.0001.jpg`, `lamp 2.0.jpg`. So what pairs up decides:

1. The field is what follows the last dot. A photo and a title of one key are a sample. A title may be called after the
   whole name of its photo (`a.jpg`, `a.jpg.txt`), and a photo may have no ending.
2. What lacks its counterpart joins the longest shorter key where there is one: `a.seg.png` and `a.en.txt` join `a`. But
   where longer keys are samples themselves (`AB.0001`, `AB.0002`), only what is no title joins `AB`, and only if that
   is one, too.
3. A photo and a title that are still alone are a sample if their names differ in capital letters only, `A.JPG` and
   `a.txt`; and where no photo has a title in its own folder, `images/1.jpg` and `titles/1.txt` are one, too. Both if
   nothing else that is alone has that name.
4. A name that comes again begins a second sample of that key if it is whole, otherwise the first one counts.

M members, S samples, G groups of members that have one key.
"""

from __future__ import annotations

import unicodedata
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from aliblip.data.products import product_id_of, shown
from aliblip.data.tar_members import IMAGE_FIELDS, JSON_FIELDS, OTHER, PHOTO, TEXT, TEXT_FIELDS, Member

__all__ = ["HAS_ID", "NO_ID", "Members", "Samples"]

WHOLE = PHOTO | TEXT
# A place behind all of `Wanted.captions`.
NO_TITLE = 127
# Of a product id.
HAS_ID, NO_ID = 1, 2
# Of names without an ending, and of photos that are called as a key.
NAMELESS = "image"
# Files that lie beside samples; as titles without a photo they would be rows that can't be used.
_SIDE_FILES = ("readme", "license", "licence", "notice", "changelog", "index", "manifest", "metadata", "stats")
# More that have only a beginning in common are no sample.
MOST_RELATIVES = 16
# Different keys of JSON members that are remembered.
MOST_KEYS = 1000
MOST_LINKS = 10


@dataclass
class Samples:
    """What `Members.samples` finds.

    Attributes:
        fields: names of the fields, as `arrays["field"]` numbers them.
        arrays: as `TarIndex` has them, and "id" (S,) int64, "id_state" (S,) int8: HAS_ID, NO_ID, or 0 where there is
            nothing; "titles" (S,) int32, how many a sample has, at least 1.
        photo_fields: fields that hold photos and do not say so.
        keys: of JSON members.
        absent: what stands in place of product ids, and how often.
        counts: samples that are "whole", have a "photo alone" or a "title alone"; and those "joined by name" and
            "joined across folders", by rule 3.
        left: what is in no sample, by what it is: [members, the first of them].
        alone: by "photo alone" and "title alone" the first name.
    """

    fields: list[str]
    arrays: dict[str, np.ndarray]
    photo_fields: list[str]
    keys: list[str]
    absent: dict[str, int]
    counts: dict[str, int]
    left: dict[str, tuple[int, str]]
    alone: dict[str, str] = field(default_factory=dict)


class Members:
    """The members of a tar that may belong to samples, about 100 bytes each."""

    def __init__(self) -> None:
        self._names, self._ends = bytearray(), array("q")
        self._endings: dict[str, int] = {}
        self._key_sizes, self._ending, self._kinds = array("i"), array("i"), array("b")
        self._offsets, self._lengths = array("q"), array("q")
        self._key_hashes, self._name_hashes = array("q"), array("q")
        self._ids, self._id_states, self._is_own = array("q"), array("b"), array("b")
        self._title_places, self._titles = array("b"), array("i")
        self._links: dict[int, str] = {}
        self._nameless: dict[str, tuple[int, int]] = {}  # that links may lead to
        self._keys: dict[str, None] = {}
        self._left: dict[str, tuple[int, str]] = {}
        self._absent: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._ends)

    def add(self, member: Member) -> None:
        """Take in the next member."""
        if member.kind is None and member.link is None:
            self._leave("hidden or special", member.name)
            return
        if not member.ending and member.kind == OTHER:
            self._leave("without an ending", member.name)
            self._nameless[member.name] = member.offset, member.length
            return
        key = member.name.rpartition(".")[0] if member.ending else member.name
        if member.link is not None:
            self._links[len(self)] = member.link
        if len(self._keys) < MOST_KEYS:
            self._keys.update(dict.fromkeys(member.keys))
        self._names += _encoded(member.name)
        self._ends.append(len(self._names))
        self._key_sizes.append(len(_encoded(key)))
        self._ending.append(self._field(member.ending))
        self._kinds.append(member.kind or OTHER)
        self._offsets.append(member.offset)
        self._lengths.append(member.length)
        self._key_hashes.append(_hash(key))
        self._name_hashes.append(_hash(member.name))
        place, titles = member.titles or (NO_TITLE, 1)
        self._title_places.append(place)
        self._titles.append(titles)
        self._add_id(member)

    def _add_id(self, member: Member) -> None:
        stored = None if member.id is None else member.id[0]
        found = None if stored is None else product_id_of(stored)
        if found is None and stored is not None:
            self._absent[len(self._ids)] = shown(stored)
        self._ids.append(found or 0)
        self._id_states.append(0 if stored is None else NO_ID if found is None else HAS_ID)
        self._is_own.append(not member.keys)

    def _field(self, ending: str) -> int:
        return self._endings.setdefault(ending or NAMELESS, len(self._endings))

    def _leave(self, what: str, name: str, count: int = 1) -> None:
        before, first = self._left.get(what, (0, name))
        self._left[what] = (before + count, first)

    def _name(self, position: int) -> str:
        begin = self._ends[position - 1] if position else 0
        return _decoded(self._names[begin : self._ends[position]])

    def samples(self) -> Samples:
        """The samples, in the order of their first members. No more members can be added."""
        return _Pairing(self).samples()


class _Pairing:
    """The work of `Members.samples`.

    Attributes:
        key, field, size: (M,) hash of the key, number of the field, and bytes of the name that are the key.
        kind: (M,) flags. Members that are nothing have -1.
    """

    def __init__(self, members: Members):
        self.members = members
        self.key = np.array(members._key_hashes, dtype=np.int64)
        self.field = np.array(members._ending, dtype=np.int32)
        self.size = np.array(members._key_sizes, dtype=np.int32)
        self.kind = np.array(members._kinds, dtype=np.int8)
        self.offset = np.array(members._offsets, dtype=np.int64)
        self.length = np.array(members._lengths, dtype=np.int64)
        self.names = list(members._endings)
        self.targets: set[int] = set()
        self.counts = {"whole": 0, "photo alone": 0, "title alone": 0}
        self.counts |= {"joined by name": 0, "joined across folders": 0}
        self.alone: dict[str, str] = {}

    def samples(self) -> Samples:
        self._resolve_links()
        self._call_by_whole_names()
        self._join_relatives()
        self._join_by(lambda key: _plain(key).casefold(), "joined by name")
        if not (self._flags()[1] == WHOLE).any():
            self._join_by(lambda key: _plain(key).rpartition("/")[2], "joined across folders")
        sample, first, flags = self._numbered()
        return self._collected(sample, first, flags)

    # --- links ---

    def _resolve_links(self) -> None:
        links, members = self.members._links, self.members
        if not links:
            return
        wanted = set(links.values())
        of_name: dict[str, int] = {}
        for position in range(len(members)):
            if (name := members._name(position)) in wanted:
                of_name.setdefault(name, position)
        for position, target in links.items():
            for _ in range(MOST_LINKS):
                found = of_name.get(target)
                if found is None or found not in links:
                    break
                target = links[found]
            self._take_over(position, target, of_name.get(target))

    def _take_over(self, position: int, target: str, found: int | None) -> None:
        """What a link leads to, under its own name."""
        ending, members = self.names[self.field[position]], self.members
        if found is not None and found not in members._links:
            self.offset[position], self.length[position] = self.offset[found], self.length[found]
            self.targets.add(found)
            kind = int(self.kind[found])
            for column in (members._ids, members._id_states, members._is_own, members._title_places, members._titles):
                column[position] = column[found]
        elif target in members._nameless:
            self.offset[position], self.length[position] = members._nameless[target]
            kind = TEXT if ending in JSON_FIELDS else OTHER  # which was not looked into
        else:
            self.kind[position] = -1
            members._leave("links that lead nowhere", members._name(position))
            return
        by_name = PHOTO if ending in IMAGE_FIELDS else TEXT if ending in TEXT_FIELDS else kind
        self.kind[position] = by_name

    # --- keys ---

    def _call_by_whole_names(self) -> None:
        """Photos whose title is called after their whole name, and photos that no ending tells from a key."""
        whole_names = np.array(self.members._name_hashes, dtype=np.int64)
        titles = np.unique(self.key[(self.kind & TEXT > 0) & (self.kind > 0)])
        has_title = np.isin(self.key, titles)
        usual = np.array([name in (*IMAGE_FIELDS, NAMELESS) for name in self.names], dtype=bool)[self.field]
        chosen = (self.kind == PHOTO) & ~has_title & (np.isin(whole_names, titles) | ~usual)
        self.key[chosen] = whole_names[chosen]
        ends = np.array(self.members._ends, dtype=np.int64)
        self.size[chosen] = (ends - np.concatenate([[0], ends[:-1]]))[chosen]
        self.field[chosen & ~usual] = self._field(NAMELESS)

    def _field(self, name: str) -> int:
        number = self.members._endings.setdefault(name, len(self.names))
        if number == len(self.names):
            self.names.append(name)
        return number

    def _flags(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Of groups: (G,) hashes of keys, flags, first members; and (M,) groups of the members."""
        keys, first, group = np.unique(self.key, return_index=True, return_inverse=True)
        flags = np.zeros(len(keys), dtype=np.int8)
        np.bitwise_or.at(flags, group, np.maximum(self.kind, 0))
        return keys, flags, first, group

    def _key(self, member: int) -> str:
        begin = self.members._ends[member - 1] if member else 0
        return _decoded(self.members._names[begin : begin + int(self.size[member])])

    def _join_relatives(self) -> None:
        keys, flags, first, group = self._flags()
        whole = flags == WHOLE
        loose = {key: g for g in np.flatnonzero(~whole) if "." in (key := self._key(first[g])).rpartition("/")[2]}
        if not loose:
            return
        taken = {short for g in np.flatnonzero(whole) for short in _shorter(self._key(first[g]))}

        def flags_of(key: str) -> int | None:
            place = int(np.searchsorted(keys, _hash(key)))
            return int(flags[place]) if place < len(keys) and keys[place] == _hash(key) else None

        joined = _relatives({key: int(flags[g]) for key, g in loose.items()}, flags_of, taken)
        order = np.argsort(group, kind="stable")
        begins = np.searchsorted(group[order], np.arange(len(keys) + 1))
        for key, target in joined.items():
            g = loose[key]
            for member in order[begins[g] : begins[g + 1]]:
                self.key[member], self.size[member] = _hash(target), len(_encoded(target))
                self.field[member] = self._field(self.members._name(member)[len(target) + 1 :].lower() or NAMELESS)

    def _join_by(self, name_of: Callable[[str], str], what: str) -> None:
        """Rule 3: pair photos and titles that are alone and have one name, which nothing else has."""
        _, flags, first, group = self._flags()
        by_name: dict[int, dict[str, list[int]]] = {PHOTO: {}, TEXT: {}}
        if not all((flags == kind).any() for kind in by_name):
            return
        for kind, found in by_name.items():
            for g in np.flatnonzero(flags == kind):
                found.setdefault(name_of(self._key(first[g])), []).append(int(g))
        target = np.arange(len(first))
        for name, titles in by_name[TEXT].items():
            photos = by_name[PHOTO].get(name, [])
            if len(titles) == len(photos) == 1:
                target[titles[0]] = photos[0]
                self.counts[what] += 1
        if self.counts[what]:
            self.key = self.key[first[target[group]]]

    # --- samples ---

    def _numbered(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(M,) the sample of each member, -1 for none; (S,) the first member and the flags of each sample."""
        _, _, _, group = self._flags()
        order = np.lexsort((self.field, group))  # stable: of equal ones in the order of the archive
        same = np.zeros(len(order), dtype=bool)
        same[1:] = (group[order][1:] == group[order][:-1]) & (self.field[order][1:] == self.field[order][:-1])
        places = np.arange(len(order))
        starts = np.maximum.accumulate(np.where(same, 0, places)) if len(order) else places
        again = np.empty(len(order), dtype=np.int64)
        again[order] = places - starts  # how often this name was there before
        again[self.kind < 0] = 0
        pairs = np.stack([group.astype(np.int64), again], axis=1) if len(order) else np.zeros((0, 2), dtype=np.int64)
        found, first, sample = np.unique(pairs, axis=0, return_index=True, return_inverse=True)
        sample = sample.reshape(-1)
        flags = np.zeros(len(found), dtype=np.int8)
        np.bitwise_or.at(flags, sample, np.maximum(self.kind, 0))
        is_left = self._left_out(found[:, 1], first, flags, sample)
        sample = np.where(is_left[sample] | (self.kind < 0), -1, sample)
        kept = np.unique(sample[sample >= 0])
        in_order = kept[np.argsort(first[kept], kind="stable")]
        number = np.full(len(found), -1, dtype=np.int64)
        number[in_order] = np.arange(len(in_order))
        return np.where(sample >= 0, number[sample], -1), first[in_order], flags[in_order]

    def _left_out(self, again: np.ndarray, first: np.ndarray, flags: np.ndarray, sample: np.ndarray) -> np.ndarray:
        """(samples,) which are none: they are told by kind."""
        is_left = (flags == OTHER) | ((again > 0) & (flags != WHOLE))
        for s in np.flatnonzero(~is_left & (flags == TEXT)):
            is_left[s] = _bare(self._key(first[s])) in _SIDE_FILES
        if self.targets:
            is_target = np.zeros(len(self.kind), dtype=bool)
            is_target[list(self.targets)] = True
            is_left |= (flags != WHOLE) & (np.bincount(sample[~is_target], minlength=len(flags)) == 0)
        sizes = np.bincount(sample[self.kind >= 0], minlength=len(flags))
        told = np.flatnonzero(is_left & (sizes > 0))
        for s in told[np.argsort(first[told])]:
            name = self.members._name(int(first[s]))
            what = "with a name that was there before" if again[s] else f".{self.names[self.field[first[s]]]}"
            self.members._leave(what, name, int(sizes[s]))
        return is_left

    def _collected(self, sample: np.ndarray, first: np.ndarray, flags: np.ndarray) -> Samples:
        members = np.flatnonzero(sample >= 0)
        members = members[np.argsort(sample[members], kind="stable")]
        of, count = sample[members], len(first)
        for what, kind in (("whole", WHOLE), ("photo alone", PHOTO), ("title alone", TEXT)):
            found = np.flatnonzero(flags == kind)
            self.counts[what] = len(found)
            if len(found):
                self.alone[what] = self.members._name(int(first[found[0]]))
        numbers, where, field = np.unique(self.field[members], return_index=True, return_inverse=True)
        by_place = np.argsort(where)
        rank = np.empty(len(numbers), dtype=np.int32)
        rank[by_place] = np.arange(len(numbers), dtype=np.int32)
        names = [self.names[numbers[i]] for i in by_place]
        # A sample is called after its photo, of samples across folders after the photo's place.
        is_photo = self.kind[members] == PHOTO
        called = np.array(first)
        called[of[is_photo][::-1]] = members[is_photo][::-1]
        keys = [_encoded(self._key(int(member))) for member in called]
        ids, states, absent = self._ids(members, of, count)
        # The number of titles is that of the first place that has some.
        titles = np.ones(count, dtype=np.int32)
        places = np.array(self.members._title_places, dtype=np.int8)[members]
        samples, chosen = np.unique(of[by := np.lexsort((places, of))], return_index=True)
        titles[samples] = np.array(self.members._titles, dtype=np.int32)[members[by[chosen]]]
        photo_fields = {names[i] for i in np.unique(rank[field[is_photo]])}
        return Samples(
            fields=names,
            arrays={
                "keys": np.frombuffer(b"".join(keys), dtype=np.uint8),
                "key_ends": np.cumsum([len(key) for key in keys], dtype=np.int64),
                "member_ends": np.cumsum(np.bincount(of, minlength=count), dtype=np.int64),
                "field": rank[field].astype(np.int32),
                "offset": self.offset[members],
                "length": self.length[members],
                "id": ids,
                "id_state": states,
                "titles": np.maximum(titles, 1),
            },
            photo_fields=sorted(name for name in photo_fields if name not in IMAGE_FIELDS),
            keys=list(self.members._keys),
            absent=absent,
            counts=self.counts,
            left=self.members._left,
            alone=self.alone,
        )

    def _ids(self, members: np.ndarray, of: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
        """Product ids of the samples: of a member of that ending, otherwise of the first JSON with that key."""
        states = np.array(self.members._id_states, dtype=np.int8)[members]
        own = np.array(self.members._is_own, dtype=np.int8)[members]
        there = np.flatnonzero(states > 0)
        there = there[np.lexsort((-own[there], of[there]))]
        samples, place = np.unique(of[there], return_index=True)
        chosen = there[place]
        ids, state = np.zeros(count, dtype=np.int64), np.zeros(count, dtype=np.int8)
        ids[samples] = np.array(self.members._ids, dtype=np.int64)[members[chosen]]
        state[samples] = states[chosen]
        absent = Counter(self.members._absent[int(members[i])] for i in chosen[states[chosen] == NO_ID])
        return ids, state, dict(absent)


def _relatives(loose: dict[str, int], flags_of: Callable[[str], int | None], taken: set[str]) -> dict[str, str]:
    """The shorter keys that incomplete ones join, by rule 2.

    Args:
        loose: flags by key, of keys with dots that lack a photo or a title.
        flags_of: of any key; None of one that is none.
        taken: keys below which there are whole samples.
    """
    flags, joined = dict(loose), {}
    waiting: dict[int, dict[str, list[str]]] = {}

    def wait(key: str, at: str) -> None:
        if short := next(iter(_shorter(at)), None):
            waiting.setdefault(_dots(short), {}).setdefault(short, []).append(key)

    for key in loose:
        wait(key, key)
    for dots in range(max(map(_dots, loose)), -1, -1):
        for key, longer in waiting.pop(dots, {}).items():
            longer = [other for other in longer if flags[other] != WHOLE]  # others have joined it
            own = flags.get(key, flags_of(key))
            if key in taken:  # its own fields, but for titles, which may have lost their photo
                if own == WHOLE:
                    joined.update({other: key for other in longer if flags[other] != TEXT})
                continue
            if not longer:
                continue
            together = np.bitwise_or.reduce([own or OTHER, *(flags[other] for other in longer)])
            if together == WHOLE and (own is not None or len(longer) <= MOST_RELATIVES):
                joined.update(dict.fromkeys(longer, key))
                flags[key] = WHOLE
                taken.update(_shorter(key))
            elif own is None:
                for other in longer:
                    wait(other, key)
            else:  # two photos, or two titles, are two samples
                joined.update({other: key for other in longer if flags[other] == OTHER})
    return {key: _last(joined, key) for key in joined if key in loose}


def _last(joined: dict[str, str], key: str) -> str:
    while key in joined:
        key = joined[key]
    return key


def _shorter(key: str) -> Iterator[str]:
    """A key without what follows its last dot, its last but one, and so on."""
    folder, slash, base = key.rpartition("/")
    while True:
        base = base.rpartition(".")[0]
        if not base:
            return
        yield folder + slash + base


def _hash(key: str) -> int:
    return hash(_plain(key))


def _plain(key: str) -> str:
    """One spelling of names whose accents are written in two ways."""
    return key if key.isascii() else unicodedata.normalize("NFC", key)


def _dots(key: str) -> int:
    return key.rpartition("/")[2].count(".")


def _bare(key: str) -> str:
    """The letters of a key's last part."""
    return "".join(filter(str.isalpha, key.rpartition("/")[2])).lower()


def _encoded(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def _decoded(name: bytes | bytearray) -> str:
    return name.decode("utf-8", "surrogateescape")
