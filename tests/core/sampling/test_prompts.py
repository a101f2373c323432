"""Prompts from text, CSV and Parquet files, what may be wrong with them, and the draw of a round."""

import json
import re
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d3po_core.errors import D3POError
from d3po_core.sampling.prompt_notes import prompt_notes, prompts_shown
from d3po_core.sampling.prompts import check_held_out, draw_prompts, load_prompts

EXPECTED = ["a red fox", "zwölf Boxkämpfer", 'a sign, saying "stop"']


def load(path: Path, column: str = "prompt") -> list[str]:
    return load_prompts(str(path), column, "sample.prompts")


def failure(path: Path, column: str = "prompt") -> str:
    with pytest.raises(D3POError) as caught:
        load(path, column)
    assert str(caught.value).startswith("sample.prompts ")
    assert path.name in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_text_file_holds_one_prompt_a_line(tmp_path: Path, encoding: str, end: str) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(end.join(["  a red fox ", "", *EXPECTED[1:], "a red fox", "   "]).encode(encoding))
    assert load(path) == EXPECTED


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("name", ["p.csv", "p.CSV"])
def test_csv_column_holds_the_prompts(tmp_path: Path, encoding: str, name: str) -> None:
    path = tmp_path / name
    path.write_bytes('prompt,n\na red fox,1\nzwölf Boxkämpfer,2\n"a sign, saying ""stop""",3\n,4\n'.encode(encoding))
    assert load(path) == EXPECTED


def test_other_csv_column_is_read_by_its_name(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text("n,text\n1,a red fox\n2,a blue fox\n3\n")
    assert load(path, "text") == ["a red fox", "a blue fox"]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet_column_holds_the_prompts(tmp_path: Path, kind: pa.DataType) -> None:
    path = tmp_path / "p.parquet"
    values = pa.array([*EXPECTED, None, EXPECTED[0]], pa.string()).cast(kind)
    pq.write_table(pa.table({"n": [1, 2, 3, 4, 5], "prompt": values}), path)
    assert load(path) == EXPECTED


def test_missing_file_is_named_with_what_to_give(tmp_path: Path) -> None:
    message = failure(tmp_path / "nowhere.txt")
    assert "no such file" in message
    assert "one prompt per line" in message


def test_folder_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    assert "no such file" in failure(tmp_path / "folder")


@pytest.mark.parametrize("name", ["p.csv", "p.parquet"])
def test_missing_column_error_lists_the_columns(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.endswith("csv"):
        path.write_text("text,n\nx,1\n")
    else:
        pq.write_table(pa.table({"text": ["x"], "n": [1]}), path)
    assert "has no column 'prompt'; its columns are text, n" in failure(path)


@pytest.mark.parametrize("name", ["p.txt", "p.csv"])
def test_file_that_is_not_utf8_is_a_one_line_error(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes("prompt\nzwölf\n".encode("latin-1"))
    assert "UTF-8" in failure(path)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"not parquet at all, really"])
def test_file_that_is_not_parquet_is_a_one_line_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "p.parquet"
    path.write_bytes(content)
    assert "Parquet" in failure(path)


def test_parquet_column_of_numbers_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    pq.write_table(pa.table({"prompt": [1, 2]}), path)
    assert "column 'prompt' holds int64; expected strings" in failure(path)


@pytest.mark.parametrize(("name", "content"), [("p.txt", ""), ("p.txt", " \n\n"), ("p.csv", "prompt\n"), ("p.csv", "")])
def test_file_without_a_prompt_is_refused(tmp_path: Path, name: str, content: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    failure(path)


def test_oversized_csv_field_is_a_one_line_error(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text("prompt\n" + "x" * 200_000 + "\n")
    failure(path)


def test_prompt_in_both_lists_is_an_error_that_shows_it() -> None:
    check_held_out(["a", "b"], ["c"])
    with pytest.raises(D3POError, match=r"1 prompts are in .*evaluate.prompts \('b' first\)"):
        check_held_out(["a", "b"], ["c", "b"])


@given(st.integers(1, 20), st.integers(0, 60), st.integers(0, 2**31), st.integers(1, 50))
def test_every_prompt_is_drawn_once_before_one_is_drawn_twice(
    size: int, count: int, seed: int, round_number: int
) -> None:
    prompts = [f"p{i}" for i in range(size)]
    drawn = draw_prompts(prompts, count, seed, round_number)
    assert len(drawn) == count
    assert len(set(drawn)) == count
    assert drawn == draw_prompts(prompts, count, seed, round_number)
    times = Counter(prompt for prompt, _ in drawn)
    assert not times or max(times.values()) - (min(times.values()) if len(times) == size else 0) <= 1
    for prompt, occurrence in drawn:
        assert 0 <= occurrence < times[prompt]


def test_fewer_groups_draw_the_first_of_more_groups() -> None:
    prompts = [f"p{i}" for i in range(10)]
    assert draw_prompts(prompts, 25, 1, 2)[:7] == draw_prompts(prompts, 7, 1, 2)


def test_order_is_new_each_round_and_each_campaign() -> None:
    prompts = [f"p{i}" for i in range(30)]
    assert len({tuple(draw_prompts(prompts, 30, seed, number)) for seed in (0, 1) for number in (1, 2)}) == 4


TWO = ["a café, in rain", "a cat"]


@pytest.mark.parametrize(("name", "content"), [
    ("p.json", json.dumps(TWO)), ("p.json", json.dumps([{"prompt": p, "n": 1} for p in TWO])),
    ("p.jsonl", "\n".join(json.dumps({"prompt": p}) for p in TWO)), ("p.jsonl", "\n".join(map(json.dumps, TWO))),
    ("p.tsv", "n\tprompt\n1\ta café, in rain\n2\ta cat\n"), ("p.csv", "n;prompt\n1;a café, in rain\n2;a cat\n"),
    ("p.csv", 'n,prompt\n1,"a café, in rain"\n2,a cat\n'), ("p.txt", "a café, in rain\r\na cat\r\n"),
])  # fmt: skip
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_prompts_are_read_from_what_people_have(name: str, content: str, encoding: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content.encode(encoding))
    assert load_prompts(str(tmp_path / name), "prompt", "sample.prompts") == TWO


@pytest.mark.parametrize(("name", "content", "message"), [
    ("p.txt", '[{"prompt": "a cat"}]', "looks like JSON"), ("p.txt", '{"prompt": "a cat"}', "looks like JSON"),
    ("p.csv", "prompt,n\na cat, in rain,1\n", "line 2: has more cells"),
    ("p.json", '{"prompt": "a cat"}', "holds a dict"),
    ("p.json", "[1, 2]", "entry 1 has no text"), ("p.jsonl", '{"text": "a cat"}', "entry 1 has no text as 'prompt'"),
    ("p.json", "[", "cannot be read"),
])  # fmt: skip
def test_what_would_run_on_rubbish_is_one_line(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(D3POError, match=message) as caught:
        load_prompts(str(tmp_path / name), "prompt", "sample.prompts")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("prompt", ["A Red Circle", "a  red   circle", "a red circle"])
def test_a_held_out_prompt_that_differs_in_case_or_spaces_only_was_trained_on(prompt: str) -> None:
    with pytest.raises(D3POError, match="1 prompts are in ") as caught:
        check_held_out([prompt], ["a red circle", "a blue cross"])
    assert "'a red circle' first" in str(caught.value)


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        (["# animals", "cat"], r"1 of 2 prompts begin with # or //.*'# animals' first"),
        (["cat", "// things"], "begin with # or //"),
        (["a cat\tanimals"], "control character"),
        (["a cat\x00"], "control character"),
        (["a\u2028b"], "control character"),
        (["a {red|blue} cat"], "wildcards"),
        (["__animal__ in a hat"], "wildcards"),
        (["<lora:x:1> a cat"], "LoRA tags"),
        (["1. a cat", "2. a dog"], "2 of 2 prompts begin with a number"),
        (['"a cat"', '"a dog"'], "between quotes"),
    ],
)
def test_what_looks_like_something_else_than_a_prompt_is_pointed_out(prompts: list[str], said: str) -> None:
    (note,) = prompt_notes(prompts, "sample.prompts")
    assert re.search(said, note)
    assert note.startswith("sample.prompts: ")


@pytest.mark.parametrize(
    "prompts", [["a cat", "an owl (8k:1.2)"], ["3. a cat", "a dog"], ['"a"', "b"], ["tag #1, {prompt}"], ["1984"]]
)
def test_plain_prompts_are_not_remarked_on(prompts: list[str]) -> None:
    assert prompt_notes(prompts, "sample.prompts") == []


def test_number_and_first_prompts_are_shown() -> None:
    assert prompts_shown(list("abcd"), "sample.prompts") == "sample.prompts: 4 prompts: 'a', 'b', 'c', ..."
