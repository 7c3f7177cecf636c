"""A tar is read whole, whatever its names and however it is packed, or it is refused with the cause."""

import bz2
import gzip
import hashlib
import io
import json
import lzma
import os
import pickle
import re
import struct
import tarfile

import numpy as np
import pytest
from data_stub import encoded, photo

from aliblip.data import tar_index
from aliblip.data.products import product_id_of, report, tell_sources
from aliblip.data.rows import decode
from aliblip.data.sources import open_source
from aliblip.data.tar_members import open_tar
from aliblip.runtime.mistakes import UsageError
from reading_aliblip import UnusableItem

COUNT = 40
PHOTOS = [encoded(photo(i), "JPEG") for i in range(COUNT)]
PACKERS = {"gzip": gzip.compress, "bzip2": bz2.compress, "xz": lzma.compress}


def title(number):
    return f"title {number}"


def tar_of(members, **options):
    """Bytes of a tar of (name, data), of TarInfo, or of (TarInfo, data)."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", **options) as tar:
        for name, data in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def pairs(names, photo_ending="jpg", title_ending="txt"):
    for i, name in enumerate(names):
        yield f"{name}.{photo_ending}", PHOTOS[i]
        yield f"{name}.{title_ending}", title(i).encode()


def link(name, to, kind=tarfile.LNKTYPE):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, to
    return info, b""


def opened(folder, data, **options):
    (folder / "shop.tar").write_bytes(data)
    return open_source(data_files=str(folder / "shop.tar"), split="train", **options)


def told(source):
    lines = []
    tell_sources(source, tell=lines.append)
    assert all("\n" not in line for line in lines)
    return "\n".join(lines)


def rows_of(source):
    return list(source.read_range(0, source.num_rows))


def assert_pairs(source, count=COUNT, names=None):
    """Every photo with its own title, in any order."""
    rows = rows_of(source)
    assert source.num_rows == len(rows) == count
    found = {}
    for row in rows:
        assert row.image == PHOTOS[int(row.text.split()[1])]
        found[row.text] = row.name
    assert sorted(found) == sorted(map(title, range(count)))
    if names is not None:
        assert [found[title(i)] for i in range(count)] == list(names)


def refusal(folder, data, **options):
    with pytest.raises(UsageError) as caught:
        opened(folder, data, **options)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    return str(caught.value)


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


LAYOUTS = {
    "plain": [f"{i:03d}" for i in range(COUNT)],
    "versions": [f"art{i // 2:03d}{'.v2' * (i % 2)}" for i in range(COUNT)],
    "article numbers": [f"AB.{i:04d}" for i in range(COUNT)],
    "several dots": [f"A.{i // 8}.{i % 8 // 2}{'.x' * (i % 2)}" for i in range(COUNT)],
    "sizes": [f"lamp {i // 2}.{i % 2} m" for i in range(COUNT)],
    "ends of sentences": [f"No. {i} of 40." for i in range(COUNT)],
    "sub-folders": [f"{'ab'[i % 2]}.{i % 2}/c d/{i // 2:03d}" for i in range(COUNT)],
    "no ASCII": [f"größe.{i}.鞋" for i in range(COUNT)],
    "upwards": [f"../../{i:03d}" for i in range(COUNT)],
    "absolute": [f"/etc/{i:03d}.d" for i in range(COUNT)],
    "long": [f"{'x' * 300}.{i}" for i in range(COUNT)],
    "upper and lower case": [f"{'aA'[i % 2]}{i // 2:03d}" for i in range(COUNT)],
}


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
    members[1::2] = [(f"{i:03d}.json", json.dumps({"caption": title(i)}).encode()) for i in range(COUNT)]
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
    assert "no column 'caption' or 'text' or 'txt'" in refusal(tmp_path, tar_of(members[:COUNT]))


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


# --------------------------------------------------------------------------------------------------- titles and columns


def json_of(**fields):
    return json.dumps(fields).encode()


def test_titles_may_stand_in_several_places(tmp_path):
    members = []
    for i in range(COUNT):
        members.append((f"{i:03d}.jpg", PHOTOS[i]))
        if i % 4 != 3:
            members.append((f"{i:03d}.txt", title(i).encode() if i % 4 < 2 else b" "))
        members.append((f"{i:03d}.json", json_of(caption=title(i) if i % 4 > 1 else [None, ""][i % 2], width=64)))
    source = opened(tmp_path, tar_of(members))
    assert_pairs(source)
    assert "of a sample the first of 'caption', 'txt' that has a text is the title" in told(source)
    source = opened(tmp_path, tar_of(members), caption_column="txt")  # one that was named is the only one
    assert sum(row.text is not None and bool(row.text.strip()) for row in rows_of(source)) == 20
    for ending in ("title", "transcript", "text", "caption"):
        assert_pairs(opened(tmp_path, tar_of(pairs(LAYOUTS["versions"], title_ending=ending))))
    named = [("AB.1.jpg", PHOTOS[0]), ("AB.1.json", json_of(product_name=title(0))), ("AB.2.jpg", PHOTOS[1])]
    named += [("AB.2.json", json_of(product_name=title(1)))]
    assert_pairs(opened(tmp_path, tar_of(named), caption_column="product_name"), 2, ["AB.1", "AB.2"])


def test_tars_of_img2dataset(tmp_path):
    for shard in range(3):
        members = []
        for i in range(shard * 10, shard * 10 + 10):
            key = f"{shard:05d}{i:04d}"
            about = json_of(caption=title(i), url="http://x", key=key, status="success", error_message=None, width=64)
            members += [(f"{key}.jpg", PHOTOS[i]), (f"{key}.json", about), (f"{key}.txt", title(i).encode())]
        (tmp_path / f"{shard:05d}.tar").write_bytes(tar_of(members))
    source = open_source(data_files=str(tmp_path / "*.tar"), split="train")
    assert_pairs(source, 30)
    assert {"url", "key", "status", "width"} <= set(source.columns)
    keys = open_source(data_files=str(tmp_path / "*.tar"), split="train", product_id_column="__key__")
    assert [row.product_id for row in rows_of(keys)] == [product_id_of(row.name) for row in rows_of(source)]
    assert (report(keys).products, report(keys).without) == (30, 0)


@pytest.mark.parametrize("as_json", [True, False])
def test_ids_that_come_late_in_any_tar(tmp_path, as_json):
    ids = [None] * 25 + [f"P{i // 2}" if i % 5 else "nan" for i in range(25, COUNT)]
    for shard in range(2):
        members = []
        for i in range(shard * 20, shard * 20 + 20):
            members += list(pairs([f"{i:03d}"], "png"))[1:] + [(f"{i:03d}.jpg", PHOTOS[i])]
            members[-2] = (f"{i:03d}.txt", title(i).encode())
            if as_json:
                members.append((f"{i:03d}.json", json_of(w=1) if ids[i] is None else json_of(product_id=ids[i])))
            elif ids[i] is not None:
                members.append((f"{i:03d}.product_id", ids[i].encode()))
        (tmp_path / f"{shard}.tar").write_bytes(tar_of(members))
    for options in ({}, {"product_id_column": "product_id"}, {"index_dir": str(tmp_path / "index")}):
        source = open_source(data_files=str(tmp_path / "*.tar"), split="train", **options)
        assert_pairs(source)
        rows, known = rows_of(source), [product_id_of(value) for value in ids]
        assert [row.product_id for row, value in zip(rows, known, strict=True) if value is not None] == [
            value for value in known if value is not None
        ]
        assert len({row.product_id for row in rows}) == len(set(known) - {None}) + known.count(None)
        found = report(source)
        assert (found.products, found.without) == (len(set(known) - {None}), known.count(None))
        assert dict(found.absent) == {"null": 25, "'nan'": 3} and found.largest[0] == ("'P13'", 2)
    with pytest.raises(UsageError, match="no column 'sku' .*'product_id'"):
        open_source(data_files=str(tmp_path / "*.tar"), split="train", product_id_column="sku")


def test_each_question_has_a_kept_index_of_its_own(tmp_path, monkeypatch):
    scans, real = [], tar_index._scan
    monkeypatch.setattr(tar_index, "_scan", lambda *args: scans.append(args) or real(*args))
    members = []
    for i in range(COUNT):
        about = json_of(caption=f"c{i}", name=title(i), product_id=i, sku=i // 2)
        members += [(f"A.{i}.jpg", PHOTOS[i]), (f"A.{i}.json", about)]
    (tmp_path / "shop.tar").write_bytes(tar_of(members))
    options = {"data_files": str(tmp_path / "shop.tar"), "split": "train", "index_dir": str(tmp_path / "index")}
    for _ in range(2):
        assert report(open_source(**options)).products == COUNT
        source = open_source(**options, caption_column="name", product_id_column="sku")
        assert_pairs(source)
        assert report(source).products == COUNT // 2
    assert len(scans) == 2


def test_the_digest_of_a_tar_as_it_should_be_has_not_changed(tmp_path):
    """Or a run of an earlier version would not go on: by its rule a field begins at the first dot."""
    members = []
    for i in range(20):
        members += [(f"a/{i:03d}.jpg", PHOTOS[i]), (f"a/{i:03d}.seg.png", b"mask"), (f"a/{i:03d}.JSON", json_of(w=i))]
        members += [(f"a/{i:03d}.txt", title(i).encode())] + [(f"a/{i:03d}.cls", b"7")] * (i % 2)
    source = opened(tmp_path, tar_of(members))
    places = {name: [] for name in ("field", "key_ends", "keys", "length", "member_ends", "offset")}
    fields, keys = {}, {}
    with tarfile.open(tmp_path / "shop.tar") as tar:
        for number, member in enumerate(tar):
            key, field = re.match(r"(.*/[^.]+)[.](.*)", member.name).groups()
            keys[key] = number + 1
            places["field"].append(fields.setdefault(field.lower(), len(fields)))
            places["offset"].append(member.offset_data)
            places["length"].append(member.size)
    places["keys"], places["member_ends"] = list("".join(keys).encode()), list(keys.values())
    places["key_ends"] = np.cumsum([len(key) for key in keys])
    digest = hashlib.blake2b(json.dumps(list(fields)).encode(), digest_size=16)
    for name, values in places.items():
        values = np.array(values, dtype={"keys": np.uint8, "field": np.int32}.get(name, np.int64))
        digest.update(f"{name} {values.dtype}".encode())
        digest.update(values)
    assert source.manifest()["files"][0]["digest"] == digest.hexdigest()


# ------------------------------------------------------------------------------------------------------ compressed tars


@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize("order", ["sorted", "photos first"])
def test_compressed_tars_give_the_same_rows_in_any_part(tmp_path, packing, order, monkeypatch):
    monkeypatch.setattr("aliblip.data.webdataset.BLOCK_ROWS", 7)
    members = list(pairs(LAYOUTS["versions"]))
    if order == "photos first":
        members.sort(key=lambda member: member[0].endswith("txt"))
    plain = rows_of(opened(tmp_path, tar_of(members)))
    source = opened(tmp_path, PACKERS[packing](tar_of(members)))
    assert rows_of(source) == plain
    for begin, end in ((0, 3), (3, 9), (9, 40), (20, 30), (5, 6), (5, 6), (0, 40)):
        assert list(source.read_range(begin, end)) == plain[begin:end]
    next(iter(source.read_range(8, 20)))  # left half-read
    again = pickle.loads(pickle.dumps(source))
    assert rows_of(again) == rows_of(source) == plain
    assert "1 tar compressed" in told(source)


def test_compressed_tars_are_found_by_name_and_not_read_beside_their_unpacked_ones(tmp_path):
    members = list(pairs(LAYOUTS["plain"]))
    for name, packing, part in (("a.tar.gz", "gzip", members[:40]), ("b.tbz2", "bzip2", members[40:])):
        (tmp_path / name).write_bytes(PACKERS[packing](tar_of(part)))
    assert_pairs(open_source(data_dir=str(tmp_path), split="train"))
    (tmp_path / "b.tar").write_bytes(tar_of(members[40:]))
    source = open_source(data_dir=str(tmp_path), split="train")
    assert_pairs(source)
    assert "left: tars that lie unpacked beside them" in told(source) and "b.tbz2" in told(source)
    (tmp_path / "b.tar").rename(tmp_path / "b.tar.zst")
    with pytest.raises(UsageError, match="b.tar.zst is a tar packed by zstd, which is not read: unpack it"):
        open_source(data_files=str(tmp_path / "b.tar.zst"), split="train")


def test_reading_on_in_a_compressed_tar_does_not_start_again(tmp_path, monkeypatch):
    source = opened(tmp_path, gzip.compress(tar_of(pairs(LAYOUTS["plain"]))))
    opens = []
    monkeypatch.setattr("aliblip.data.webdataset.open_tar", lambda *args: opens.append(args) or open_tar(*args))
    for begin in range(0, COUNT, 4):
        assert len(list(source.read_range(begin, begin + 4))) == 4
    assert len(opens) == 1
    list(pickle.loads(pickle.dumps(source)).read_range(0, 4))  # another process has a stream of its own
    assert len(opens) == 2


def test_members_that_are_too_large_to_read_are_rows_with_a_reason(tmp_path, monkeypatch):
    monkeypatch.setattr("aliblip.data.webdataset.MAX_FILE_BYTES", 2**20)
    monkeypatch.setattr("aliblip.data.webdataset.MOST_TEXT_BYTES", 2**20)
    members = [*pairs(["000"]), ("001.jpg", bytes(2**20 + 1)), ("001.txt", b"t"), ("002.jpg", PHOTOS[0])]
    rows = rows_of(opened(tmp_path, tar_of([*members, ("002.txt", b"x" * (2**20 + 1))])))
    assert decode(rows[0]).text == title(0)
    for row in rows[1:]:
        with pytest.raises(UnusableItem, match="a member of 1,048,577 bytes is larger than 1 MiB"):
            decode(row)
