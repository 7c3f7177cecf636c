"""Tars for tests: their bytes, and what has to come out of them."""

import bz2
import gzip
import io
import json
import lzma
import tarfile

import pytest
from data_stub import encoded, photo

from aliblip.data.products import tell_sources
from aliblip.data.sources import open_source
from aliblip.runtime.mistakes import UsageError

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


def json_of(**fields):
    return json.dumps(fields).encode()


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


# Names of 40 photos, without their endings.
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
