"""Rows of one's own: files as tasks and as training data, what is wrong named by its line."""

import json
import re
from types import SimpleNamespace

import pytest
from datasets import Dataset

import softar
from softar.files import read_dataset, read_rows
from softar.recipe_data import open_task
from softar.tasks import load_task

ROWS = [
    {"prompt": "<bos> D4 D8 D1 D3 ->", "answer": "S0", "group": "a"},
    {"prompt": "<bos> D8 D4 D1 D3 ->", "answer": "S0", "group": "a"},
    {"prompt": "<bos> D9 D1 D1 D1 ->", "answer": "S6", "group": None},
]


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def csv_of(rows):
    head = [*rows[0]]
    return "\n".join([",".join(head), *(",".join(str(r[k] or "") for k in head) for r in rows)])


def write(folder, name, rows=ROWS):
    file = folder / name
    if name.endswith("parquet"):
        Dataset.from_list(rows).to_parquet(file)
    else:
        text = {"jsonl": lines, "json": json.dumps, "csv": csv_of}[file.suffix[1:]](rows)
        file.write_text(text)
    return str(file)


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet"])
def test_a_file_is_a_task_and_training_data(tmp_path, ending):
    file = write(tmp_path, f"rows.{ending}")
    task = load_task(file)
    assert task.name == file and task.train is None and task.max_new_tokens is None
    assert task.test["prompt"] == [row["prompt"] for row in ROWS]
    assert task.test["group"][:2] == ["a", "a"]
    assert [task.score(text, task.test[0]) for text in ("S0 ", "S1", "")] == [1, 0, 0]
    assert read_dataset(file)["answer"] == ["S0", "S0", "S6"]
    decoder = softar.make_decoder("mnns-soft-tiny=soft", max_new_tokens=5)
    (row,) = softar.compare([decoder], task.test, task.score, extract=task.extract).rows
    assert (row["n"], row["groups"], task.test["group"][2]) == (3, 2, None)


def test_a_folder_has_both(tmp_path):
    write(tmp_path, "train.csv", ROWS[:1])
    write(tmp_path, "test.jsonl", ROWS[1:])
    task = load_task(f"{tmp_path}:score=number")
    assert (len(task.train), len(task.test)) == (1, 2)
    assert len(load_task(str(tmp_path), size=1).train) == 1
    (tmp_path / "test.jsonl").unlink()
    with pytest.raises(ValueError, match=r"holds no rows to answer: test\.jsonl"):
        load_task(str(tmp_path))


@pytest.mark.parametrize(
    "score, answer, right, wrong",
    [
        ("exact", "two  words", ["two words", " two words\n"], ["Two words", "two", ""]),
        (
            "number",
            "72",
            ["so 72.", "3 + 69 = 72.0", "$72", "#### 72"],
            ["72 - 1", "71", "", "none"],
        ),
        ("number", "#### 1,234.5", ["1234.50", "it is 1,234.5"], ["1234", "12345"]),
        ("number", -3, ["-3", "x = -3.0", "-3.", "$-3", "\u22123", "(-3)", "4 * -3"], ["3", "7-3"]),
        ("number", "-$5", ["\u20135", "-5", r"-\$5", "$-5"], ["5", "10-5", "10\u20135", "10%-5%"]),
        (
            "number",
            "1/2",
            ["0.5", r"\frac{1}{2}", "3/6", ".50"],
            ["5/2", "2", "1", "2/1", "1/2/24"],
        ),
        ("number", 8, ["10-8", "(2)-8", "pages 10-8", "x-8", "10 - 8"], ["-8", "=-8", "10.-8 -8"]),
        (
            r'regex,pattern="Answer: (\\w+)"',
            "blue",
            ["Answer: red. Answer: blue"],
            ["blue", "Answer: red"],
        ),
        (r'regex,pattern="S-?\\d+"', "S0", ["S4 S1 S0"], ["S0 S4", "0"]),
        (f"{__name__}:half", "x", ["x"], []),
    ],
)
def test_scorers(tmp_path, score, answer, right, wrong):
    file = write(tmp_path, "rows.jsonl", [{"prompt": "q", "answer": answer}])
    task = load_task(f"{file}:score={score}")
    row, full = task.test[0], 0.5 if "half" in score else 1.0
    assert [task.score(text, row) for text in right] == [full] * len(right)
    assert [task.score(text, row) for text in wrong] == [0] * len(wrong)


def test_the_patterns_that_an_error_advises_are_read(tmp_path):
    file = write(tmp_path, "rows.jsonl", [{"prompt": "q", "answer": "72"}])
    with pytest.raises(ValueError, match="needs one") as caught:
        load_task(f"{file}:score=regex")
    advised = re.findall(r'e\.g\. (pattern=(?:"[^"]*"|[^";]*))', str(caught.value))
    for pattern, text in zip(advised, ("Answer: 72", "72, sure"), strict=True):
        task = load_task(f"{file}:score=regex,{pattern}")
        assert task.score(text, task.test[0]) == 1


def half(text, row):
    return 0.5 * (text == row["answer"])


@pytest.mark.parametrize(
    "answer", ["", "A", "7", "#### -1,2.5", ".", "-", "\u2212 3", " x ", "nan"]
)
@pytest.mark.parametrize("score", ["exact", "number", r"regex,pattern=\d+"])
def test_a_gold_answer_scores_itself_or_is_refused(tmp_path, score, answer):
    """Where nothing could be right, or all that nothing was read in, accuracies meant nothing."""
    file = write(tmp_path, "rows.jsonl", [{"prompt": "q", "answer": answer}])
    try:
        task = load_task(f"{file}:score={score}")
    except ValueError as error:
        assert "line 1: answer=" in str(error) and not (score == "exact" and answer)
        return
    row = task.test[0]
    assert task.score("", row) == 0 and task.score("nothing", row) == 0
    is_read = not score.startswith("regex") or re.search(r"\d", answer)
    assert task.score(answer, row) == (1 if is_read else 0)


@pytest.mark.parametrize("answer", [7, 0, 1.5, False, True, "7", ["a", "b"], {"a": 1}])
def test_a_scorer_of_ones_own_gets_the_answer_as_it_is(tmp_path, answer):
    """It got the text of a number or a truth value, which equals neither."""
    for ending in ("jsonl", "json", "parquet"):
        file = write(tmp_path, f"rows.{ending}", [{"prompt": "q", "answer": answer}])
        row = load_task(f"{file}:score={__name__}:same").test[0]
        assert row["answer"] == answer and type(row["answer"]) is type(answer)
        assert same(json.dumps(answer), row) == 1


def same(text, row):
    return json.loads(text) == row["answer"]


def test_other_names_of_columns_and_chats(tmp_path):
    rows = [
        {"question": [{"role": "user", "content": "2 + 2"}], "gold": 4, "kind": "sum", "more": [1]},
        {"question": [{"role": "user", "content": "2 - 2"}], "gold": 0, "kind": "sum", "more": []},
    ]
    file = write(tmp_path, "rows.jsonl", rows)
    task = load_task(f"{file}:prompt=question,answer=gold,group=kind,score=number")
    assert task.test["answer"] == ["4", "0"] and task.test["group"] == ["sum", "sum"]
    assert task.test[0]["prompt"] == rows[0]["question"] and task.test[0]["more"] == [1]


def test_columns_that_the_first_row_lacks(tmp_path):
    """They are there, None where a row has none: a scorer, groups and training lost them."""
    rows = [
        {"prompt": "a", "answer": "1"},
        {"answer": "2", "prompt": "b", "group": "g", "unit": "m"},
    ]
    for ending in ("jsonl", "json"):
        file = write(tmp_path, f"rows.{ending}", rows)
        for read in (load_task(file).test, read_dataset(file)):
            assert read["group"] == [None, "g"] and read["unit"] == [None, "m"]


def tool(**properties):
    schema = {"type": "object", "properties": properties, "required": [*properties]}
    return {"type": "function", "function": {"name": "f", "parameters": schema}}


CHAT = [{"role": "user", "content": "Hi"}]
CALL = {"name": "f", "arguments": {"city": "Bern"}}
UNLIKE = [
    {
        "prompt": CHAT,
        "tools": [tool(city={"type": "string"})],
        "chat_template_kwargs": {"enable_thinking": False, "effort": None},
        "tests": {"f": 1, "tolerance": 1e-12, "cases": [{"a": 2**60}, {"b": [0.1]}]},
    },
    {
        "prompt": [*CHAT, {"role": "assistant", "content": "", "tool_calls": [CALL]}],
        "tools": [tool(x={"type": "integer", "enum": [1]}, y={"type": "integer"}), tool()],
        "chat_template_kwargs": {},
        "tests": {"g": "5", "cases": []},
    },
    {"prompt": CHAT, "tools": [], "tests": {}, "ordered": {"b": 1, "a": 2}},
    {
        "prompt": CHAT,
        "ordered": {"a": 1, "b": 2},
        "tools": None,
        "chat_template_kwargs": {"effort": "low"},
        "tests": None,
    },
]
UNLIKE = [{"answer": str(i), "completion": CHAT} | row for i, row in enumerate(UNLIKE)]


@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet"])
def test_what_a_row_holds_depends_on_no_other_row(tmp_path, ending):
    """Dicts inside had the keys of all rows, None where a row has none: a template read tools of
    nulls, and an option that a row does not set."""
    columns = {name: None for row in UNLIKE for name in row}
    file, expected = tmp_path / f"rows.{ending}", [columns | row for row in UNLIKE]
    if ending == "parquet":  # as datasets writes it
        kept = read_dataset(write(tmp_path, "rows.jsonl", UNLIKE))
        kept.to_parquet(file)
    else:
        write(tmp_path, file.name, UNLIKE)
    whole = read_dataset(file)
    assert [[*row["ordered"]] for row in whole if row["ordered"]] == [["b", "a"], ["a", "b"]]
    assert [*whole] == whole.to_list() == [*load_task(str(file)).test] == expected
    for row, alone in zip(UNLIKE, expected, strict=True):
        one = read_dataset(write(tmp_path, "one.jsonl", [row]))[0]
        assert one == {name: alone[name] for name in one}
    assert [*whole.map(lambda row: {"answer": row["answer"] + "!"})] == [
        row | {"answer": row["answer"] + "!"} for row in expected
    ]


def test_nulls_of_a_parquet_file_are_not_told_to_a_template(tmp_path):
    """Its structs have the keys of all rows."""
    chats = [row | {"prompt": CHAT} for row in UNLIKE]
    texts = [{k: row[k] for k in ("prompt", "answer", "tools")} for row in chats]
    Dataset.from_list(texts).to_parquet(tmp_path / "rows.parquet")
    assert load_task(str(tmp_path / "rows.parquet")).test["tools"] == [x["tools"] for x in texts]


@pytest.mark.parametrize("value", [2**64, float("nan")])
def test_numbers_that_no_column_keeps_are_refused(tmp_path, value):
    file = write(tmp_path, "rows.jsonl", [{"prompt": "a", "x": {"a": value}}, {"x": {"b": 1}}])
    with pytest.raises(ValueError, match=r"rows.jsonl: a column holds values"):
        read_dataset(file)


@pytest.mark.parametrize(
    "name, text, spec, says",
    [
        (
            "r.jsonl",
            '{"prompt": "a", "answer": "b"}\n{"prompt": "a"}\n',
            "",
            "line 2: no 'answer', it has ['prompt']: add it, or say which column it is with answer=COLUMN",
        ),
        (
            "r.jsonl",
            '{"prompt": "a", "answer": "b"}\n\n{oops}\n',
            "",
            "line 3: no JSON (Expecting property",
        ),
        ("r.jsonl", "[1]\n", "", 'line 1: [1] is no object: give {"prompt": ..., "answer": ...}'),
        ("r.jsonl", '{"prompt": " ", "answer": "b"}\n', "", "line 1: prompt=' ' must be a text"),
        ("r.jsonl", '{"prompt": 3, "answer": "b"}\n', "", "line 1: prompt=3 must be a text"),
        (
            "r.jsonl",
            '{"prompt": "a", "answer": ["b"]}\n',
            "",
            "line 1: answer=['b'] must be a text or a number",
        ),
        ("r.jsonl", '{"prompt": "a", "answer": ""}\n', "", "line 1: answer='' is empty"),
        ("r.csv", "prompt,gold\na,b\nc,\n", ":answer=gold", "line 3: gold='' is empty: give an"),
        ("r.csv", "prompt,answer\na, \n", ":score=regex,pattern=x", "line 2: answer=' ' is empty"),
        (
            "r.csv",
            "prompt,answer\na,7\nb,seven\n",
            ":score=number",
            "line 3: answer='seven' holds no number for score=number: give one, or choose another",
        ),
        ("r.jsonl", '{"prompt": "a", "answer": NaN}', ":score=number", "answer='nan' holds no"),
        (
            "r.jsonl",
            '{"prompt": "a", "answer": "b"}\n{"prompt": [{"role": "user", "content": "x"}], "answer": "b"}',
            "",
            "line 2: texts and chats in one file",
        ),
        (
            "r.jsonl",
            '{"prompt": "a", "answer": "b", "x": 1}\n{"prompt": "a", "answer": "b", "x": [1]}',
            "",
            "a column holds values of different kinds",
        ),
        ("r.jsonl", "\n", "", "holds no row"),
        ("r.json", '{"prompt": "a"}', "", "is no list of objects"),
        ("r.json", '[{"prompt": "a",\n "answer"}]', "", "line 2: no JSON"),
        ("r.json", '{"prompt": ["a"], "answer": []}', "", "its columns have [0, 1] values"),
        ("r.csv", "prompt,answer\na,b\nc\n", "", "line 3: fewer fields than the header's 2"),
        ("r.csv", "prompt,answer\na,b,c\n", "", "line 2: more fields than the header's 2"),
        ("r.csv", "prompt,prompt\na,b\n", "", "are no names of columns"),
        ("r.parquet", "no", "", "is no parquet file"),
        (
            "r.jsonl",
            '{"prompt": "a", "answer": "b"}',
            ":scor=number",
            "takes no 'scor', did you mean 'score'",
        ),
        (
            "r.jsonl",
            '{"prompt": "a", "answer": "b"}',
            ":score=numbr",
            "score='numbr' is unknown, did you mean 'number'?",
        ),
        (
            "r.jsonl",
            '{"prompt": "a", "answer": "b"}',
            ":score=regex",
            r"score=regex needs one, e.g. pattern=Answer: (\d+); one with commas",
        ),
        *(
            ("r.jsonl", '{"prompt": "a", "answer": "b"}', f":score=regex,pattern={value}", says)
            for value, says in [
                (r'"is (\d+)"', r"JSON string: double its backslashes (\\d for \d), or leave"),
                (r"'is (\d+)'", r"(\\d for \d), in double quotes, or leave the quotes out"),
                ("'is it'", "take double quotes, or leave"),
                ('"is it', "end it with a double quote, or leave"),
                ('"is" it', "end it with a double quote, or leave"),
                (r'"\bis"', "holds a backspace: double the backslashes"),
            ]
        ),
        (
            "r.jsonl",
            '{"prompt": "a", "answer": "b"}',
            ":pattern=x",
            "a pattern goes with score=regex",
        ),
        (
            "r.jsonl",
            '{"prompt": "a", "answer": "b"}',
            ":score=regex,pattern=(",
            "pattern='(' is no regular expression",
        ),
        ("r.jsonl", '{"prompt": "a", "answer": "b"}', ":group=kind", "line 1: no 'kind'"),
        (
            "r.jsonl",
            '{"prompt": "a", "answer": "b"}',
            ":score=nomodule:f",
            "module 'nomodule' cannot be imported",
        ),
        (
            "r.jsonl",
            '{"prompt": "a", "answer": "b"}',
            f":score={__name__}:ROWS",
            "is a list, no function",
        ),
        ("r.jsonl", None, "", "there is no such file"),
    ],
)
def test_what_is_wrong_is_named_by_its_line(tmp_path, name, text, spec, says):
    file = tmp_path / name
    if text is not None:
        file.write_text(text)
    with pytest.raises(ValueError, match=re.escape(says)) as error:
        load_task(f"{file}{spec}")
    assert "\n" not in str(error.value)


def test_lines_of_a_csv_with_line_ends_in_it(tmp_path):
    (tmp_path / "r.csv").write_text('prompt,answer\n"a\nb",c\nd,e\n')
    assert [line for line, _ in read_rows(tmp_path / "r.csv")] == [2, 4]


def script(**given):
    names = dict(task=None, dataset_name=None, dataset_config=None, task_size=None, eval_rows=None)
    splits = dict(dataset_train_split="train", dataset_test_split="test", dataset_streaming=False)
    return SimpleNamespace(**names | splits | given), SimpleNamespace(datasets=[])


def test_a_recipe_takes_a_file(tmp_path):
    """--dataset_name FILE, in every ending; columns that do not fit are told with those there are."""
    rows = [{"prompt": r["prompt"], "completion": " " + r["answer"]} for r in ROWS]
    for ending in ("jsonl", "json", "csv", "parquet"):
        task = open_task(*script(dataset_name=write(tmp_path, f"rows.{ending}", rows)))
        assert len(task.train) == 3 and task.test is None and task.score is None
    file = write(tmp_path, "own.jsonl", ROWS)
    with pytest.raises(
        ValueError, match=r"has columns \['prompt', 'answer', 'group'\], and rows need"
    ) as error:
        open_task(*script(dataset_name=file))
    assert "prompt and completion, or messages, or conversations, or text" in str(error.value)
    assert open_task(*script(dataset_name=file), formats=(("prompt",),)).train.num_rows == 3
    with pytest.raises(ValueError, match="has no rows to train on: --dataset_name FILE"):
        open_task(*script(task=file))
    with pytest.raises(ValueError, match=r"there is no such file"):
        open_task(*script(dataset_name=str(tmp_path / "gone.jsonl")))


def test_held_out_rows_are_not_lost_without_a_word(tmp_path, capsys):
    """A folder with dev.jsonl has a split "validation", which nobody named."""
    rows = [{"prompt": r["prompt"], "completion": " " + r["answer"]} for r in ROWS]
    (tmp_path / "data").mkdir()
    for split in ("train", "dev"):
        write(tmp_path / "data", f"{split}.jsonl", rows)
    folder = str(tmp_path / "data")
    assert open_task(*script(dataset_name=folder)).test is None
    assert "--dataset_test_split validation" in capsys.readouterr().err
    task = open_task(*script(dataset_name=folder, dataset_test_split="validation", eval_rows=2))
    assert len(task.test) == 2 and not capsys.readouterr().err
    with pytest.raises(ValueError, match=r"dataset_test_split='dev' is not among \['train', 'val"):
        open_task(*script(dataset_name=folder, dataset_test_split="dev"))
    with pytest.raises(ValueError, match=r"eval_rows=2: .* has no held-out rows"):
        open_task(*script(dataset_name=folder, eval_rows=2))


@pytest.mark.parametrize(
    "given, says",
    [
        (dict(task_size=2), "task_size=2 says nothing to a file: give the rows"),
        (dict(dataset_config="main"), "dataset_config='main' says nothing to a file"),
        (dict(dataset_test_split="dev"), "dataset_test_split='dev' says nothing to a file"),
        (dict(dataset_train_split="all"), "dataset_train_split='all' says nothing to a file"),
        (dict(dataset_streaming=True), "dataset_streaming=True says nothing to a file"),
        (dict(task="mnns", dataset_config="main"), "dataset_config='main' says nothing to a task"),
        (dict(task="mnns", dataset_test_split="dev"), "'dev' says nothing to a task"),
    ],
)
def test_options_of_rows_that_their_source_does_not_read(tmp_path, given, says):
    file = write(tmp_path, "rows.jsonl", [{"prompt": "a", "completion": "b"}] * 3)
    with pytest.raises(ValueError, match=says):
        open_task(*script(**{} if "task" in given else dict(dataset_name=file), **given))
