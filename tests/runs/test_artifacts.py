"""Prompts of a run: one per line of a file, or a list."""

import pytest

from hsivi_diffusers.runs.artifacts import column_prompts, read_json, read_prompts
from hsivi_diffusers.runs.default_prompts import default_prompts


@pytest.mark.parametrize(
    ("content", "prompts"),
    [
        ("a cat\n\n a dog \n", ["a cat", "a dog"]),
        ("\ufeffa cat\r\na dog", ["a cat", "a dog"]),
        ("a\x0ccat\na\u2028dog\nan\x85owl\n", ["a\x0ccat", "a\u2028dog", "an\x85owl"]),
    ],
)
def test_prompts_of_a_file_are_its_lines(tmp_path, content, prompts):
    (tmp_path / "prompts.txt").write_bytes(content.encode())
    assert read_prompts(str(tmp_path / "prompts.txt")) == prompts == read_prompts([*prompts, " "])


@pytest.mark.parametrize("text", ["a cat\na dog", "a cat\ra dog"])
def test_a_prompt_of_a_list_has_no_line_break(text):
    with pytest.raises(ValueError, match="the prompt 'a cat.*a dog' has a line break: give each prompt in one line"):
        read_prompts(["an owl", text])


def test_default_names_the_prompts_of_the_package_whatever_lies_in_the_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "default").write_text("a cat\n")
    assert read_prompts("default") == [*default_prompts()]
    assert read_prompts("./default") == ["a cat"]
    assert read_prompts(["default"]) == ["default"]


def test_the_columns_of_a_grid_have_the_first_prompts_that_are_trained():
    prompts = [f"prompt {number}" for number in range(12)]
    assert column_prompts(prompts, {}) == column_prompts(prompts, {"class_shares": None}) == prompts[:8]
    assert column_prompts(prompts, {"class_shares": [0, 1] * 6}) == prompts[1::2]


@pytest.mark.parametrize(("content", "record"), [('{"a": 1}', {"a": 1}), ("{", {}), ("[1]", {}), (None, {})])
def test_a_missing_or_damaged_record_is_empty(tmp_path, content, record):
    if content is not None:
        (tmp_path / "record.json").write_text(content)
    assert read_json(tmp_path / "record.json") == record
