"""A tar is read whole, whatever its names, or it is refused with the cause."""

import gzip
import os
import random
import re
import struct
import tarfile

import numpy as np
import pytest
from tars import (
    COUNT,
    LAYOUTS,
    PACKERS,
    PHOTOS,
    assert_pairs,
    json_of,
    link,
    opened,
    pairs,
    refusal,
    rows_of,
    tar_of,
    title,
    told,
)

from aliblip.data.rows import decode
from aliblip.data.sources import open_source
from aliblip.runtime.mistakes import UsageError
from reading_aliblip import UnusableItem

# ----------------------------------------------------------------------------------------------------- whole or refused


@pytest.mark.parametrize("packing", [None, *PACKERS])
def test_a_tar_that_is_cut_off_anywhere_is_refused(tmp_path, packing):
    data = tar_of(pairs([f"{i:03d}" for i in range(6)]))
    end = data.rstrip(b"\0").__len__()
    end += -end % 512 + 512  # one empty block marks the end
    data = data if packing is None else PACKERS[packing](data)
    assert_pairs(opened(tmp_path, data), 6)
    for cut in sorted({*range(0, len(data), 512), *range(1, len(data), 331), len(data) - 1}):
        if packing is None and cut >= end:
            assert_pairs(opened(tmp_path, data[:cut]), 6)  # only zeros are missing
            continue
        message = refusal(tmp_path, data[:cut])
        assert "shop.tar" in message
        if packing is None:
            assert re.search("cut off|is empty|not a readable tar", message), message


def test_what_is_missing_is_said(tmp_path):
    data = tar_of(pairs([f"{i:03d}" for i in range(6)]))
    border = data.index(b"003.jpg")
    message = refusal(tmp_path, data[:border])
    assert f"is cut off at byte {border:,}: the end of the archive is missing (6 members before that)" in message
    (command,) = re.findall(r"close it: (head -c 1024 /dev/zero >> '.*')$", message)
    assert os.system(command) == 0
    assert_pairs(open_source(data_files=str(tmp_path / "shop.tar"), split="train"), 3)
    message = refusal(tmp_path, data[: border + 612])
    assert f"cut off within '003.jpg', which has {len(PHOTOS[3]):,} bytes by its header, and 100 are there" in message
    assert "is empty (0 bytes)" in refusal(tmp_path, b"")
    assert "is a zip file, not a tar" in refusal(tmp_path, b"PK\x03\x04" + bytes(600))
    assert "is a zstd file, not a tar" in refusal(tmp_path, b"\x28\xb5\x2f\xfd" + bytes(600))
    assert "not a readable tar" in refusal(tmp_path, b"<html>404</html>" * 100)
    assert "shop.tar" in refusal(tmp_path, b"BZh001.jpg is no bzip2".ljust(600, b"x"))
    assert_pairs(opened(tmp_path, tar_of(pairs(["BZh9", "PK\x03\x04"]))), 2)  # only the first name looks like it
    packed = gzip.compress(data)
    assert "is cut off: the gzip stream has no end" in refusal(tmp_path, packed[:-9])
    broken = bytearray(packed)
    broken[-6] ^= 1
    assert "CRC" in refusal(tmp_path, bytes(broken))


def test_a_damaged_header_ends_nothing_in_silence(tmp_path):
    data = tar_of(pairs([f"{i:03d}" for i in range(6)]))
    for name in (b"000.jpg", b"000.txt", b"003.jpg", b"005.txt"):
        start = data.index(name)
        for place in (0, 4, 100, 130, 150, 156, 300):
            broken = bytearray(data)
            broken[start + place] ^= 0x41
            assert re.search("damaged|not a readable tar", refusal(tmp_path, bytes(broken)))


def test_archives_that_were_put_together_are_all_read(tmp_path):
    parts = [tar_of(list(pairs([f"{i:03d}" for i in range(COUNT)]))[i : i + 20]) for i in range(0, 80, 20)]
    assert_pairs(opened(tmp_path, b"".join(parts)))
    assert_pairs(opened(tmp_path, bytes(2**21).join(parts)))
    assert_pairs(opened(tmp_path, b"".join(gzip.compress(part) for part in parts)))
    message = refusal(tmp_path, b"".join(parts) + b"a signature")
    assert "goes on after the end of the archive" in message and "bytes that are no tar" in message
    (command,) = re.findall(r"cut them off: (truncate -s \d+ '.*')$", message)
    assert os.system(command) == 0
    assert_pairs(open_source(data_files=str(tmp_path / "shop.tar"), split="train"))
    assert "cut off" in refusal(tmp_path, b"".join(parts)[:-20000])


def with_size(data, name, field):
    """The size in a header as `field`, with the checksum put right."""
    start = data.index(name)
    header = bytearray(data[start : start + 512])
    header[124:136] = field
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return data[:start] + bytes(header) + data[start + 512 :]


def large(size):
    return b"\x80" + struct.pack(">q", size).rjust(11, b"\0")


def test_absurd_sizes_are_refused_in_one_line(tmp_path):
    data = tar_of(pairs([f"{i:03d}" for i in range(3)]))
    for name in (b"000.jpg", b"001.txt", b"002.txt"):
        message = refusal(tmp_path, with_size(data, name, large(8 * 2**40)))
        assert f"'{name.decode()}', which has 8,796,093,022,208 bytes by its header" in message
        assert "shop.tar" in refusal(tmp_path, with_size(data, name, large(2**62)))
        assert "shop.tar" in refusal(tmp_path, with_size(data, name, b"\xff" * 11 + b"\0"))  # below zero
        packed = gzip.compress(with_size(data, name, large(8 * 2**40)))
        assert "shop.tar" in refusal(tmp_path, packed)
    # Headers that announce terabytes of name, attributes or chains of headers.
    info = tarfile.TarInfo("x" * 300 + ".jpg")
    for format, what in ((tarfile.PAX_FORMAT, b"././@PaxHeader"), (tarfile.GNU_FORMAT, b"././@LongLink")):
        long = tar_of([*pairs(["000"]), (info, PHOTOS[0])], format=format)
        assert "a header of 8,796,093,022,208 bytes" in refusal(tmp_path, with_size(long, what, large(8 * 2**40)))
    wide = tarfile.TarInfo("wide.jpg")
    wide.pax_headers = {"size": str(8 * 2**40)}
    assert "8,796,093,022,208 bytes" in refusal(tmp_path, tar_of([(wide, PHOTOS[0])], format=tarfile.PAX_FORMAT))
    one = long[: long.index(b"././@LongLink") + 1024]
    start = long.index(b"././@LongLink")
    assert "shop.tar" in refusal(tmp_path, long[:start] + one[start:] * 5000 + long[start:])


def test_sparse_files_are_refused_by_name(tmp_path):
    info = tarfile.TarInfo("001.jpg")
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "001.jpg"}
    info.pax_headers |= {"GNU.sparse.realsize": str(8 * 2**40)}
    sparse = b"1\n0\n512\n".ljust(512, b"\0") + bytes(512)
    message = refusal(tmp_path, tar_of([*pairs(["000"]), (info, sparse)], format=tarfile.PAX_FORMAT))
    assert "'001.jpg' is stored as a sparse file" in message and "--sparse" in message


# ----------------------------------------------------------------------------------------------------- keys and fields


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("order", ["sorted", "photos first", "titles first", "turned", "shuffled"])
def test_every_photo_finds_its_title(tmp_path, layout, order):
    members = list(pairs(LAYOUTS[layout]))
    if order == "shuffled":
        np.random.default_rng(0).shuffle(members)
    elif order != "sorted":
        members.sort(key=lambda member: member[0].endswith("txt"), reverse=order == "titles first")
        members = members[40:] + members[:40][::-1] if order == "turned" else members
    assert_pairs(opened(tmp_path, tar_of(members)), names=LAYOUTS[layout])


@pytest.mark.parametrize("prefix", ["./", "./photos/", "photos//", "photos/./"])
def test_prefixes_make_no_difference(tmp_path, prefix):
    members = [(f"{prefix}{name}" if i % 2 else os.path.normpath(f"{prefix}{name}"), data)
               for i, (name, data) in enumerate(pairs(LAYOUTS["versions"]))]  # fmt: skip
    folder = tarfile.TarInfo(prefix)
    folder.type = tarfile.DIRTYPE
    folder_of = os.path.normpath(prefix).strip(".")
    names = [os.path.join(folder_of, name) for name in LAYOUTS["versions"]]
    assert_pairs(opened(tmp_path, tar_of([(folder, b""), *members])), names=names)


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_every_format_of_tar(tmp_path, format):
    names = [f"{'folder/' * 20 if format == tarfile.USTAR_FORMAT else 'x' * 200}{i}" for i in range(COUNT)]
    infos = []
    for name, data in pairs(names):
        info = tarfile.TarInfo(name)
        info.uname, info.mtime = "größe" if format == tarfile.PAX_FORMAT else "", 1.5
        infos.append((info, data))
    assert_pairs(opened(tmp_path, tar_of(infos, format=format)), names=names)


ENDINGS = ("jpg", "JPG", "jpeg", "JPEG", "jfif", "jpe", "Jpg", "pjpeg", "jpg_640x640", "image", "data", "")


def test_photos_of_every_ending(tmp_path):
    members = []
    for i in range(COUNT):
        ending = ENDINGS[i % len(ENDINGS)]
        members += [(f"{i:03d}{ending and '.'}{ending}", PHOTOS[i]), (f"{i:03d}.{'tT'[i % 2]}xt", title(i).encode())]
    assert_pairs(opened(tmp_path, tar_of(members)), names=[f"{i:03d}" for i in range(COUNT)])
    members[1::2] = [(f"{i:03d}.json", json_of(caption=title(i))) for i in range(COUNT)]
    assert_pairs(opened(tmp_path, tar_of(members)))


def test_a_photo_that_can_not_be_read_says_so_itself(tmp_path):
    heic = b"\0\0\0\x18ftypheic" + bytes(300)
    members = [*pairs(["000"]), ("001.heic", heic), ("001.txt", b"t"), ("002.jxl", b"\xff\x0a"), ("002.txt", b"t")]
    rows = rows_of(opened(tmp_path, tar_of(members)))
    assert [row.name for row in rows] == ["000", "001", "002"] and rows[1].image == heic
    for row in rows[1:]:
        with pytest.raises(UnusableItem, match="not an image of a known format|HEIC|pillow-heif"):
            decode(row)


def test_titles_after_the_whole_name_and_photos_without_an_ending(tmp_path):
    for names in ([f"{i:03d}" for i in range(COUNT)], [f"AB.{i:03d}" for i in range(COUNT)]):
        members = [(f"{name}.jpg", PHOTOS[i]) for i, name in enumerate(names)]
        members += [(f"{name}.jpg.txt", title(i).encode()) for i, name in enumerate(names)]
        assert_pairs(opened(tmp_path, tar_of(members)))
        members = [(name, PHOTOS[i]) for i, name in enumerate(names)]
        members += [(f"{name}.txt", title(i).encode()) for i, name in enumerate(names)]
        assert_pairs(opened(tmp_path, tar_of(members)), names=names)
        source = opened(tmp_path, tar_of(members[:COUNT]), sides="images")
        assert [row.image for row in rows_of(source)] == PHOTOS


def test_further_fields_stay_fields(tmp_path):
    members = []
    for i in range(COUNT):
        members += [(f"{i:03d}.jpg", PHOTOS[i]), (f"{i:03d}.seg.png", b"mask"), (f"{i:03d}.seg.json", b'{"area": 7}')]
        members += [(f"{i:03d}.en.txt", b"english"), (f"{i:03d}.txt", title(i).encode()), (f"{i:03d}.cls", b"7")]
    data = tar_of(members)
    source = opened(tmp_path, data, other_columns=["area", "cls", "en.txt"])
    assert_pairs(source)
    assert rows_of(source)[3].others == {"area": 7, "cls": 7, "en.txt": "english"}
    assert "40 photos beside another one of their sample" in told(source)
    assert [row.text for row in rows_of(opened(tmp_path, data, caption_column="en.txt"))] == ["english"] * COUNT
    assert rows_of(opened(tmp_path, data, image_column="seg.png"))[5].image == b"mask"


def test_parts_that_only_begin_alike_are_one_sample(tmp_path):
    members = []
    for i in range(COUNT):
        members += [(f"{i:03d}.left.jpg", PHOTOS[i]), (f"{i:03d}.txt", title(i).encode())]
    assert_pairs(opened(tmp_path, tar_of(members)), names=[f"{i:03d}" for i in range(COUNT)])
    members += [(f"{i:03d}.right.jpg", PHOTOS[0]) for i in range(COUNT)]
    data = tar_of(members)
    with pytest.raises(UsageError, match=r"no column 'image': there are 'left.jpg', 'txt', 'right.jpg'; name one with"):
        opened(tmp_path, data)
    assert_pairs(opened(tmp_path, data, image_column="left.jpg"))
    # one of the two alone, among samples as they should be: not taken in its place without a word
    source = opened(tmp_path, tar_of([*pairs(["000"]), ("001.seg.png", b"mask"), ("001.txt", b"t")]))
    with pytest.raises(UnusableItem, match=r"'seg.png'.*--image_column"):
        decode(rows_of(source)[1])


def test_a_lost_photo_is_not_replaced_by_its_neighbour(tmp_path):
    members = [
        member for member in pairs(LAYOUTS["article numbers"]) if member[0] not in ("AB.0007.jpg", "AB.0009.txt")
    ]
    source = opened(tmp_path, tar_of(members))
    rows = {row.name: row for row in rows_of(source)}
    assert len(rows) == COUNT and rows["AB.0007"].image is None and rows["AB.0009"].text is None
    lines = told(source)
    assert "1 photo without a title ('AB.0009.jpg'): rows that can't be used" in lines
    assert "1 title without a photo ('AB.0007.txt')" in lines


def test_photos_and_titles_in_folders_of_their_own(tmp_path):
    members = [(f"images/{i:03d}.jpg", PHOTOS[i]) for i in range(COUNT)]
    members += [(f"titles/{i:03d}.txt", title(i).encode()) for i in range(COUNT)]
    source = opened(tmp_path, tar_of(members))
    assert_pairs(source, names=[f"images/{i:03d}" for i in range(COUNT)])
    assert "40 photos in one folder, and the title of that name in another: taken as pairs" in told(source)


def test_names_that_never_meet_are_one_sentence_with_counts(tmp_path):
    members = [(f"photo.{i}.jpg", PHOTOS[i]) for i in range(COUNT)] + [(f"title.{i}.txt", b"t") for i in range(30)]
    for chosen in (members, [(name.replace(".", "-", 1), data) for name, data in members]):
        message = refusal(tmp_path, tar_of(chosen))
        assert re.search(r"of 40 photos \('photo.0.jpg'\) and 30 titles \('title.0.txt'\) no two are called", message)
    assert opened(tmp_path, tar_of(members), sides="images").num_rows >= COUNT
    table = ("captions.csv", b"file,caption")
    message = refusal(tmp_path, tar_of([*members[:COUNT], table]))
    assert "of 40 photos ('photo.0.jpg') none has a title beside it, a .txt or a .json with a caption" in message
    assert "--caption_column; 1 member belong to no sample: 1 .csv ('captions.csv')" in message
    hidden = [(f".thumbnails/{name}", data) for name, data in members]
    assert "has no samples: 70 members belong to no sample: 70 hidden" in refusal(tmp_path, tar_of(hidden))


def test_names_that_differ_in_spelling_alone_are_pairs(tmp_path):
    composed, apart = "gr\u00f6\u00dfe", "gro\u0308\u00dfe"  # as macOS writes them
    members = [(f"{composed}.{i}.jpg", PHOTOS[i]) for i in range(COUNT)]
    members += [(f"{apart}.{i}.txt", title(i).encode()) for i in range(COUNT)]
    assert_pairs(opened(tmp_path, tar_of(members)))
    members = [(f"IMG_{i}.JPG", PHOTOS[i]) for i in range(COUNT)]
    members += [(f"{'Img' if i % 2 else 'IMG'}_{i}.txt", title(i).encode()) for i in range(COUNT)]
    source = opened(tmp_path, tar_of(members))
    assert_pairs(source, names=[f"IMG_{i}" for i in range(COUNT)])
    assert "20 photos and the title whose name differs in capital letters: taken as pairs" in told(source)
    members += [("img_1.txt", b"which?")]  # now two that are alone have the name
    rows = rows_of(opened(tmp_path, tar_of(members)))
    assert [row.text for row in rows if row.name == "IMG_1"] == [None]


# ---------------------------------------------------------------------------------------------------- names that repeat


def test_keys_that_begin_again_are_samples_of_their_own(tmp_path):
    members = list(pairs([f"{i % 20:03d}" for i in range(COUNT)]))
    for chosen in (members, sorted(members, key=lambda member: member[0].endswith("txt"))):
        assert_pairs(opened(tmp_path, tar_of(chosen)))


def test_a_member_that_comes_twice_is_told(tmp_path):
    members = list(pairs(LAYOUTS["plain"]))
    data = tar_of([*members, ("003.txt", b"another title"), ("004.JPG", PHOTOS[0]), members[10]])
    source = opened(tmp_path, data)
    assert_pairs(source)  # the first counts
    assert "3 members belong to no sample: 3 with a name that was there before ('003.txt')" in told(source)


# ---------------------------------------------------------------------------------------------------------------- links


def test_links_are_what_they_lead_to(tmp_path):
    members = list(pairs(LAYOUTS["plain"]))
    linked = []
    for i, (name, data) in enumerate(members):
        if i % 3:
            linked.append((name, data))
        else:  # a copy elsewhere, and a link to it; every second one through another link
            linked.append((f"store/blob{i}", data))
            if i % 2:
                linked.append(link(f"links/{name}.lnk", f"./store/blob{i}"))
                linked.append(link(name, f"links/{name}.lnk"))
            else:
                linked.append(link(name, f"store/blob{i}", tarfile.SYMTYPE))
    assert_pairs(opened(tmp_path, tar_of(linked)), names=LAYOUTS["plain"])
    first = list(pairs(["a/000"]))
    same = [*first, link("b/000.jpg", "../a/000.jpg", tarfile.SYMTYPE), link("b/000.txt", "a/000.txt")]
    rows = rows_of(opened(tmp_path, tar_of(same)))
    assert len(rows) == 2 and rows[0].image == rows[1].image and rows[0].product_id == rows[1].product_id


def test_links_that_lead_nowhere_are_told(tmp_path):
    members = list(pairs(["000", "001"])) + [("002.txt", b"t"), link("002.jpg", "../../etc/passwd", tarfile.SYMTYPE)]
    members += [link("003.jpg", "004.jpg"), link("004.jpg", "003.jpg"), ("003.txt", b"t")]
    source = opened(tmp_path, tar_of(members))
    rows = rows_of(source)
    assert [row.name for row in rows] == ["000", "001", "002", "003"] and rows[2].image is rows[3].image is None
    assert "3 links that lead nowhere ('002.jpg')" in told(source)


# --------------------------------------------------------------------------------------------- what lies beside samples


def test_what_is_no_sample_is_named_and_counted(tmp_path):
    fifo = tarfile.TarInfo("pipe.jpg")
    fifo.type = tarfile.FIFOTYPE
    beside = [("README", b"x"), ("README.md", b"x"), ("LICENSE.txt", b"x"), ("00000.parquet", b"PAR1")]
    beside += [("00000_stats.json", b'{"count": 3}'), ("._000.jpg", b"\0\x05\x16\x07"), (".DS_Store", b"\0")]
    beside += [("@eaDir/000.jpg/SYNOPHOTO_THUMB_XL.jpg", PHOTOS[0]), ("__MACOSX/000.jpg", b"x"), (fifo, b"")]
    beside += [(".thumbnails/000.jpg", PHOTOS[0]), ("Thumbs.db", b"\xd0\xcf"), ("notes.pdf", b"%PDF")]
    source = opened(tmp_path, tar_of([*beside[:6], *pairs(LAYOUTS["plain"]), *beside[6:]]))
    assert_pairs(source)
    (line,) = [line for line in told(source).splitlines() if "belong to no sample" in line]
    assert "13 members belong to no sample" in line
    for part in (
        "1 without an ending ('README')",
        "1 .parquet ('00000.parquet')",
        "1 .json",
        "1 .md",
        "1 .txt",
        "1 .pdf",
    ):
        assert part in line
    assert "7 hidden or special ('._000.jpg')" in line


def test_nothing_to_tell_is_not_told(tmp_path):
    assert not opened(tmp_path, tar_of(pairs(LAYOUTS["plain"]))).told


@pytest.mark.parametrize("seed", range(40))
def test_any_names_in_any_order(tmp_path, seed):
    """Keys with dots, of which one may begin another; titles as .txt or JSON; masks, labels and their JSON beside."""
    rng = random.Random(seed)
    parts = ("a", "b", "AB", "1", "2", "0001", "v2", "x 1", "größe", "鞋")
    keys = {
        rng.choice(("", "", "d/", "d/e.f/")) + ".".join(rng.choice(parts) for _ in range(rng.randint(1, 4)))
        for _ in range(rng.choice((1, 4, 20, COUNT)))
    }
    members, keys = [], rng.sample(sorted(keys), len(keys))
    for i, key in enumerate(keys):
        members.append((f"{key}.{rng.choice(('jpg', 'JPG', 'png', 'jfif'))}", PHOTOS[i]))
        as_text, as_json = (f"{key}.txt", title(i).encode()), (f"{key}.json", json_of(caption=title(i)))
        members.append(rng.choice((as_text, as_json)))
        beside = (
            (f"{key}.zz.png", b"\x89PNG\r\n\x1a\nmask"),
            (f"{key}.zz.json", json_of(area=3)),
            (f"{key}.cls", b"7"),
        )
        members += [member for member in beside if rng.random() < 0.3]
    if seed % 3:
        rng.shuffle(members) if seed % 3 == 1 else members.sort(key=lambda member: member[0].rpartition(".")[2])
    assert_pairs(opened(tmp_path, tar_of(members)), len(keys))
