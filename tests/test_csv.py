"""A line of CSV is one row with its whole text, or the file is refused with the number of the line."""

import csv

import pytest
from drawing import (
    COUNT,
    NAMES,
    TITLES,
    all_rows,
    draw,
    lines,
    open_at,
    opened,
    pairs,
    read,
    refused,
    titles,
    told,
    whole,
)

from aliblip.data import delimited
from aliblip.runtime.mistakes import UsageError


@pytest.fixture
def folder(tmp_path):
    return draw(tmp_path)


# ------------------------------------------------------------------------------------------------------ forms of CSV


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_every_delimiter_and_line_end(folder, delimiter, end):
    rows = [(name, f"{title}, or; {i}| ") for i, (name, title) in enumerate(pairs())]
    text = lines(rows, delimiter=delimiter).replace("\n", end)
    source = opened(folder, text)
    assert titles(source) == [title.strip() for _, title in rows]
    assert delimited.DELIMITER_NAMES[delimiter] in told(source)
    assert titles(opened(folder, "\ufeff" + text)) == [title.strip() for _, title in rows]


def test_what_a_cell_may_hold(folder):
    """Delimiters, quotes and line breaks within quotes; a field of a megabyte; no quotes where none are needed."""
    odd = ['a "red" mug', "two\nlines", "three\r\nlines, with a comma\n\nand a gap", '"', "'", "x" * 1_000_000]
    odd += ["6 inch", '6" pan', "tab\there", "größe 鞋 👟", "\u2028 one line\u2028", "a;b|c"]
    rows = list(zip(NAMES, odd, strict=True))
    for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL):
        source = opened(folder, lines(rows, quoting=quoting))
        assert [row.text for row in source.read_range(0, COUNT)] == odd
        for start, stop in ((0, 3), (2, 7), (5, 6), (11, 12)):  # in any order, any part
            assert [row.text for row in source.read_range(start, stop)] == odd[start:stop]
    # quotes within fields that are not quoted are text
    assert titles(opened(folder, 'file_name,caption\n00.png,6" pan\n01.png,a "red" mug\n')) == ['6" pan', 'a "red" mug']


def test_blank_lines_trailing_delimiters_and_what_excel_writes(folder):
    text = "sep=;\r\nfile_name;caption;\r\n\r\n00.png;a;;;\r\n   \r\n01.png;b\r\n;;\r\n02.png;c;\r\n\r\n"
    source = opened(folder, text)
    assert [row.text for row in source.read_range(0, 4)] == ["a", "b", None, "c"]  # a line of delimiters is a row
    assert titles(opened(folder, 'file_name| caption\n00.png| a, b\n01.png| "c| d"\n')) == ["a, b", "c| d"]


def test_a_column_alone_holds_whole_lines(folder):
    (folder / "titles.csv").write_text('caption\nSet of 2, red mug\n"a, b"\nc; d\n')
    source = open_at(data_files=str(folder / "titles.csv"), sides="titles")
    assert titles(source) == ["Set of 2, red mug", "a, b", "c; d"]
    assert "give what is between them as --csv_delimiter" in refused(folder, "file_name^caption\n00.png^a\n")
    assert titles(opened(folder, "file_name^caption\n00.png^a\n", delimiter="^")) == ["a"]


def test_the_delimiter_is_the_one_that_fits_all_lines(folder):
    source = opened(folder, "file_name;caption;price, net\n00.png;a, b;9,50\n01.png;c, d, e;8,50\n")
    assert source.columns == ["image", "caption", "price, net"] and titles(source) == ["a, b", "c, d, e"]
    (folder / "feed.tsv").write_text(lines(pairs(), ("image_link", "title")))  # whose name is wrong
    whole(open_at(data_files=str(folder / "feed.tsv")))


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ('05.png,"12 inch pan', "a quote opens a field"),  # never closed
        ('05.png,"Pro" 12 inch pan', "text follows the quote that closes a field"),
        ('05.png,"12" pan, "large"', "text follows the quote that closes a field"),
        ("05.png,Set of 2, red mug", "it has 3 fields, the header has 2"),
        ("05.png", "it has 1 field, the header has 2"),
        ("05.png;mug", "it has 1 field, the header has 2"),
        ("05.png,mug\0s", "it holds a NUL character"),
    ],
)
def test_a_line_that_is_no_row_is_refused_with_its_number(folder, row, problem):
    text = lines(pairs()).split("\n")
    text[6] = row
    text[2] = '01.png,"two, and more"'  # so that the file does have quotes
    text = "\n".join(text)
    message = refused(folder, text)
    assert f"metadata.csv, line 7: {problem}" in message and "--bad_lines skip" in message
    source = opened(folder, text, bad_lines="skip")
    found, reasons = read(source)
    expected = [row for row in all_rows() if row[0] != 5]
    expected[1] = (1, "two, and more")
    assert found == expected and source.num_rows == COUNT
    (reason,) = reasons
    assert reason.startswith(f"line 7 of metadata.csv: {problem}")
    assert "1 lines of metadata.csv are not rows (line 7), and are skipped" in told(source)


def test_a_quote_that_a_later_one_closes_swallows_no_row(folder):
    """Each of these is valid CSV of fewer rows."""
    text = lines(pairs()).split("\n")
    text[2] = '01.png,"two, and more"'
    text[4], text[9] = '03.png,"12 inch pan', '08.png,pan of 12"'
    message = refused(folder, "\n".join(text))
    assert "line 5: a quote opens a field that goes on to line 10, over what look like rows of their own" in message
    # next to each other, and with the photo's name behind
    text[4:6] = ['03.png,"12 inch pan', '04.png,pan of 12"']
    text[9] = "08.png,x"
    assert "line 5" in refused(folder, "\n".join(text))
    behind = ["caption,file_name", *(f"{title},{name}" for name, title in pairs())]
    behind[1] = '"a, b",00.png'
    behind[3], behind[8] = '"12 inch pan,02.png', '10",07.png'
    assert "line 4" in refused(folder, "\n".join(behind))
    # numbered rows without names of photos
    numbered = ["id,caption", *(f"{i},{title}" for i, title in enumerate(TITLES))]
    numbered[1:4] = ['0,"a, b"', "1,c", '2,"12 inch pan']
    numbered[8] = '7,10"'
    (folder / "titles.csv").write_text("\n".join(numbered))
    with pytest.raises(UsageError, match="line 4"):
        open_at(data_files=str(folder / "titles.csv"), sides="titles")
    # three columns of words
    words = ["size,caption,colour", *(f"s,{title},red" for title in TITLES)]
    words[1:4] = ['s,"a, b",red', "s,c,red", 's,"12 inch,red']
    words[8] = 's,10",red'
    (folder / "titles.csv").write_text("\n".join(words))
    with pytest.raises(UsageError, match="line 4"):
        open_at(data_files=str(folder / "titles.csv"), sides="titles")
    # who says so is believed
    source = opened(folder, "\n".join(text), quotes="doubled")
    assert source.num_rows == COUNT - 1


def test_of_quotes_only_what_reads_the_file_is_advised(folder):
    text = ["file_name,caption", *(f"{name},{title}" for name, title in pairs())]
    text[2], text[6] = '01.png,"a"', '05.png,"12 inch pan'
    message = refused(folder, "\n".join(text))
    assert "or, if quotes are text, give --csv_quotes none; or --bad_lines" in message and "doubled" not in message
    assert titles(opened(folder, "\n".join(text), quotes="none"))[5] == '"12 inch pan'
    text[8] = '07.png,"Pro" 12 inch pan, steel'  # which has a comma, too
    message = refused(folder, "\n".join(text))
    assert "--csv_quotes" not in message and 'write each of its own twice, as in "12"" pan"; or --bad_lines' in message
    text[6], text[8] = text[5], '07.png,"""Pro"" 12 inch pan, steel"'
    assert titles(opened(folder, "\n".join(text)))[7] == '"Pro" 12 inch pan, steel'
    assert "or, if each quote is right as it is, give --csv_quotes doubled" in refused(
        folder, 'file_name,caption\n00.png,"a, b\n01.png,c\n02.png,d"\n03.png,"e"\n'
    )
    assert "if backslashes stand before quotes, give --csv_quotes backslash" in refused(
        folder, 'file_name,caption\n00.png,"12\\" pan, red"\n', quotes="doubled"
    )


def test_text_of_many_lines_is_no_row_of_its_own(folder):
    text = "first line\n  a list:\n- red, blue\n- green\n\nlast line, the end"
    rows = [(name, f"{title}\n{text}") for name, title in pairs()]
    assert titles(opened(folder, lines(rows))) == [title for _, title in rows]


def test_a_file_without_quoting_has_inch_signs(folder):
    """Tab-separated files mostly have no quoting: then a quote is a quote, if the whole file can be read so."""
    text = "file_name\tcaption\n" + "".join(f'{name}\t"{title} 15" rack\n' for name, title in pairs())
    source = opened(folder, text)
    assert titles(source) == [f'"{title} 15" rack' for title in TITLES]
    assert "quotes are text" in told(source)
    source = opened(folder, 'file_name,caption\n00.png,"12 inch pan\n01.png,a\n')
    assert titles(source) == ['"12 inch pan', "a"]
    # not where quotes are more than that
    assert "line 2" in refused(folder, 'file_name,caption\n00.png,"12 inch pan\n01.png,"a"\n')
    assert titles(opened(folder, 'file_name,caption\n00.png,"12 inch pan\n01.png,"a"\n', quotes="none"))[1] == '"a"'


def test_quotes_with_backslashes(folder):
    text = 'file_name,caption\n00.png,"12\\" pan, red"\n01.png,"a \\"b\\" c"\n02.png,plain\n'
    source = opened(folder, text)
    assert titles(source) == ['12" pan, red', 'a "b" c', "plain"]
    assert "quotes are escaped by backslashes" in told(source)
    assert titles(opened(folder, text, quotes="backslash")) == ['12" pan, red', 'a "b" c', "plain"]
    assert "line 2" in refused(folder, text, quotes="doubled")
    # a backslash by itself is text
    assert titles(opened(folder, 'file_name,caption\n00.png,"C:\\mugs, red"\n')) == ["C:\\mugs, red"]


def test_headers(folder):
    source = opened(folder, " file_name ,caption,,tag,tag\n00.png,a,1,2,3\n")
    assert source.columns == ["image", "caption", "column 3", "tag", "tag (5)"]
    assert "two columns 'caption' (2 and 3): rename one" in refused(folder, "file_name,caption,caption\n00.png,a,b\n")
    without = "".join(f"{name},{title}\n" for name, title in pairs())
    message = refused(folder, without)
    assert "no header: its first line is '00.png,mug no 0'" in message and "--csv_columns" in message
    whole(opened(folder, without, names=("file_name", "caption")))
    assert "names 3 columns, metadata.csv has 2" in refused(folder, without, names=("a", "b", "c"))
    assert "has no rows" in refused(folder, "file_name,caption\n")
    assert "has no lines" in refused(folder, "\n\n")
    # a header over two lines
    assert opened(folder, 'file_name,"caption\n(English)",caption\n00.png,a,b\n').columns[1] == "caption\n(English)"


def test_names_that_are_given_must_differ(folder):
    without = "".join(f"{name},{title},x\n" for name, title in pairs())
    assert "two columns 'caption'" in refused(folder, without, names=("file_name", "caption", "caption"))


def test_very_many_lines_are_looked_at_once_each(folder):
    """A quote that is never closed must not make a file of n lines cost n squared."""
    rows = 3 * delimited.MOST_LINES
    text = "file_name,caption\n" + "".join(
        f'{i:05d}.png,"{i} inch\n' if i % 500 == 0 else f"{i:05d}.png,x, y\n" for i in range(rows)
    )
    seen, plain = 0, delimited._Feed.__next__

    def counted(feed):
        nonlocal seen
        seen += 1
        return plain(feed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(delimited._Feed, "__next__", counted)
        assert f"{rows:,} of {rows:,} rows can't be read whole (lines 2, 3, 4, 5, 6 and {rows - 5:,} more)" in refused(
            folder, text
        )
    assert seen < 5 * rows


def test_columns_are_found_by_what_people_call_them(folder):
    for photo, title in (
        ("Image Path", "Product Name"),
        ("image_link", "title"),
        ("FILENAME", "Text"),
        ("img", "name"),
    ):
        source = opened(folder, lines(pairs(), (photo, title)), "list.csv")
        whole(source)
        assert f"photo in '{photo}', title in '{title}'" in told(source)
    # a default goes first, and what is named before all
    rows = [(name, "x", title, "y") for name, title in pairs()]
    whole(opened(folder, lines(rows, ("image", "title", "caption", "name")), "list.csv"))
    with pytest.raises(UsageError, match="no column 'nr' .--caption_column.: there are 'image', 'title'"):
        open_at(folder, caption_column="nr")
