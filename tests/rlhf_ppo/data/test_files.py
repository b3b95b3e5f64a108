"""Data files: every layout is read, and what is damaged or ambiguous is one line with the file's name."""

from __future__ import annotations

import gzip
import json

import pytest

from rlhf_ppo.cli import main
from rlhf_ppo.data.files import load_rows

ROWS = [{"prompt": f"p{i}", "n": i} for i in range(10)]


def lines(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize(
    "text",
    [
        "\n" + lines(ROWS).replace("\n", "\r\n\n"),
        "\ufeff" + lines(ROWS).rstrip(),
        json.dumps(ROWS),
        "".join(json.dumps(row, indent=1) + "\n" for row in ROWS),
    ],
    ids=[
        "lines with blank ones between",
        "byte order mark, no newline at the end",
        "one list",
        "objects over several lines",
    ],
)
def test_layouts_of_json(tmp_path, text):
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    assert load_rows(str(tmp_path / "a.json")).to_list() == ROWS


def test_a_folder_of_json_has_its_splits_and_their_parts(tmp_path):
    (tmp_path / "train.jsonl").write_text(lines(ROWS[:6]))
    with gzip.open(tmp_path / "test.jsonl.gz", "wt") as file:
        file.write(lines(ROWS[6:]))
    for split, rows in (
        ("train", ROWS[:6]),
        ("test", ROWS[6:]),
        ("test[1:3]+train[50%:]", ROWS[7:9] + ROWS[3:6]),
        ("train[-2:]", ROWS[4:6]),
    ):
        assert load_rows(str(tmp_path), split).to_list() == rows
    for split, said in (("dev", 'Unknown split "dev"'), ("train[x]", "Unrecognized instruction format")):
        with pytest.raises(ValueError, match=f"data set {tmp_path} cannot be read: {said}"):
            load_rows(str(tmp_path), split)
    with pytest.raises(ValueError, match="has no rows"):
        load_rows(str(tmp_path), "train[6:]")


CUT = [f"{n * 7919 % 10007},{n}\n" for n in range(3000)]
BAD = {
    "a.jsonl": ('{"prompt": "a"}\n\n{"prompt": \n', r"JSON parse error in line 3 \(Expecting value\)"),
    "b.jsonl": ('{"prompt": "a"}\n["b"]\n', r"JSON parse error in line 2: a row must be an object, got \[.b.\]"),
    "c.json": ('[{"prompt": "a"}, {"prompt": ]', "Expecting value"),
    "d.jsonl": (
        '{"prompt": "a", "t": {"x": 1, "x": 2}}\n',
        "line 1 has the key 'x' twice in one object: rename",
    ),
    "e.csv": ('prompt,n,prompt\n"a,b",1,c\n', "the column 'prompt' occurs twice: rename or remove one of them"),
    "f.csv.gz": (gzip.compress(b"n,n\n1,2\n"), "the column 'n' occurs twice"),
    "g.csv.gz": (gzip.compress("".join(["a,b\n", *CUT]).encode())[:9000], "the gzip file is cut off or damaged"),
    "h.jsonl.gz": (gzip.compress(lines(CUT).encode())[:9000], "the gzip file is cut off or damaged"),
    "i.jsonl.gz": (b'{"prompt": "a"}\n', "the gzip file is cut off or damaged .*copy or download it again"),
    "j.jsonl": (b'{"prompt": "\xff"}\n', "it is not UTF-8 text"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("as_folder", [False, True], ids=["file", "folder"])
def test_a_bad_file_is_one_line_with_its_name(tmp_path, name, as_folder):
    content, said = BAD[name]
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    source = tmp_path if as_folder else tmp_path / name
    with pytest.raises(ValueError, match=rf"^data set {source} cannot be read: .*{said}[^\n]*$"):
        load_rows(str(source))


def test_the_command_ends_with_one_line_and_exit_code_2(tmp_path, capsys):
    (tmp_path / "p.csv").write_text("prompt,prompt\na,b\n")
    flags = f"generate --model embedded --dataset {tmp_path}/p.csv --output {tmp_path}/o.jsonl"
    assert main(flags.split()) == 2
    assert capsys.readouterr().err == (
        f"error: data set {tmp_path}/p.csv cannot be read: the column 'prompt' occurs twice: rename or remove one of "
        "them\n"
    )
