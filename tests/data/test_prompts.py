"""Prompts from files, dealt out as they are to modules that make no rollouts of their own."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from latentreward.core.contracts import sources_of
from latentreward.core.errors import InputError
from latentreward.data import PromptDataModule, decode_image
from latentreward.data.alignment.prompt_files import read_prompt_set
from latentreward.data.alignment.prompts import PromptLoaders, PromptOrder, PromptSampler

WANTED = ("a red cat", "ein Fuß, lang", "two dogs")


def write(path: Path) -> Path:
    rows = [{"prompt": prompt, "id": number} for number, prompt in enumerate((*WANTED, "", WANTED[0]))]
    if path.suffix == ".txt":
        path.write_text("\r\n".join(row["prompt"] for row in rows), encoding="utf-8-sig")
    elif path.suffix == ".json":
        path.write_text(json.dumps([*rows[:2], *(row["prompt"] for row in rows[2:])]))
    elif path.suffix == ".jsonl":
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    elif path.suffix == ".csv":
        path.write_text("id,prompt\n" + "".join(f'{row["id"]},"{row["prompt"]}"\n' for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("suffix", ["txt", "json", "csv"])
def test_texts_in_utf_16_are_read(suffix: str, tmp_path: Path) -> None:
    file = write(tmp_path / f"prompts.{suffix}")
    file.write_text(file.read_text(encoding="utf-8-sig"), encoding="utf-16")
    assert PromptDataModule(str(file)).prompts == WANTED


@pytest.mark.parametrize("suffix", ["txt", "json", "jsonl", "csv", "parquet"])
def test_every_format_gives_the_distinct_prompts_in_order(
    suffix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A row without a prompt is told; in a text it is a blank line."""
    assert PromptDataModule(str(write(tmp_path / f"prompts.{suffix}"))).prompts == WANTED
    left_out = f"1 rows without a prompt are left out, the first is row {len(WANTED) + 1}"
    assert (left_out in caplog.text) == (suffix != "txt")


def test_comments_of_a_text_are_left_out_and_dashes_are_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("# sheet 1\na fox -- soft light\n\n  #\n#2 mug, 7 --> 8, half-timbered # 3\n")
    found = PromptDataModule(str(tmp_path / "a.txt")).prompts
    assert found == ("a fox -- soft light", "#2 mug, 7 --> 8, half-timbered # 3")


def test_a_text_has_a_prompt_a_line_whatever_ends_it(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes(b"a cat\ra dog\r\n\r\n2\xe2\x80\xa8birds\n")
    assert [row.prompt for row in read_prompt_set(str(tmp_path / "prompts.txt"))] == ["a cat", "a dog", "2\u2028birds"]


def test_a_json_object_counts_by_its_list_or_by_values_that_have_prompts(tmp_path: Path) -> None:
    file = tmp_path / "prompts.json"
    rows = [{"prompt": "a cat", "category": "animals"}, {"prompt": "a dog", "source": "laion"}]
    for content in (
        {"version": 1, "prompts": ["a cat", "a dog"]},
        {"prompts": rows},
        dict(zip("xy", rows, strict=True)),
    ):
        file.write_text(json.dumps(content))
        assert PromptDataModule(str(file)).prompts == ("a cat", "a dog")


def test_pictures_to_edit_in_parquet_are_refused_and_other_columns_are_not(tmp_path: Path) -> None:
    file = tmp_path / "prompts.parquet"
    rows = {"prompt": ["a cat"], "image_source": ["laion"], "image": [b"\x89PNG"]}
    pq.write_table(pa.table(rows), file)
    assert PromptDataModule(str(file)).prompts == ("a cat",)
    pq.write_table(pa.table({**rows, "input_images": [[b"\x89PNG"]]}), file)
    with pytest.raises(InputError, match=r"row 1 is an edit of a picture, in 'input_images'"):
        PromptDataModule(str(file))


def test_a_table_is_cut_where_lines_end_alone(tmp_path: Path) -> None:
    (tmp_path / "prompts.tsv").write_text("prompt\tnote\na\u2028cat\t" + "x" * 140_000 + "\na\x85dog\t\n")
    assert PromptDataModule(str(tmp_path / "prompts.tsv")).prompts == ("a\u2028cat", "a\x85dog")


class Ranks:
    """Stands in for a trainer of several ranks."""

    lightning_module, overfit_batches = None, 0

    def __init__(self, world_size: int, rank: int = 0) -> None:
        self.distributed_sampler_kwargs = {"num_replicas": world_size, "rank": rank}


def test_fewer_prompts_than_ranks_are_refused() -> None:
    data = PromptLoaders(WANTED)
    data.trainer = Ranks(4)  # type: ignore[assignment]
    with pytest.raises(InputError, match="3 prompts for 4 ranks"):
        data.train_dataloader()


def loader(world_size: int = 1, rank: int = 0, **options: Any) -> Any:
    data = PromptLoaders(WANTED, **{"batch_size": 4 // world_size, "batches_per_epoch": 4, "seed": 0, **options})
    data.trainer = Ranks(world_size, rank)  # type: ignore[assignment]
    return data.train_dataloader()


def test_modules_without_rollouts_get_prompts_that_are_the_same_on_any_number_of_ranks() -> None:
    one = list(loader())
    assert [len(batch) for batch in one] == [4] * 4
    assert len({key for batch in one for key in batch.keys}) == 16
    two = [list(loader(2, rank)) for rank in range(2)]
    assert [set(a.keys) | set(b.keys) for a, b in zip(*two, strict=True)] == [set(batch.keys) for batch in one]


def test_the_place_among_prompts_is_kept_over_epochs_and_batch_sizes() -> None:
    first = loader()
    whole = [key for batch in first for key in batch.keys]
    first.sampler.set_epoch(1)
    whole += [key for batch in first for key in batch.keys]
    other = loader()
    iterator = iter(other)
    taken = [key for _ in range(3) for key in next(iterator).keys]
    resumed = loader(batch_size=2, batches_per_epoch=6)
    resumed.load_state_dict(other.state_dict())
    assert resumed.places.remaining() == 3
    taken += [key for batch in resumed for key in batch.keys]
    assert taken == whole[: len(taken)]
    back = loader()
    back.load_state_dict(other.state_dict(undo=1))
    assert list(next(iter(back)).keys) == whole[8:12]


def test_the_place_among_prompts_in_another_order_is_refused() -> None:
    state = PromptSampler(2, 10, seed=1).state_dict(3)
    with pytest.raises(InputError, match=r"^seed_everything \(or data\.seed\) is 2, but 1 in the checkpoint"):
        PromptSampler(2, 10, seed=2).load_state_dict(state)


def test_a_resumed_epoch_is_followed_by_the_prompts_that_follow_it() -> None:
    whole, resumed = PromptSampler(2, 5), PromptSampler(2, 5)
    resumed.load_state_dict(PromptSampler(2, 5).state_dict(3))
    taken = []
    for sampler in (whole, resumed):
        taken.append(list(sampler))
        sampler.set_epoch(1)
        taken[-1] += sampler
    assert taken[1] == taken[0][3:]


def test_passes_end_a_run_of_prompts() -> None:
    ends: list[int] = []
    sampler = PromptSampler(2, 10, max_prompts=6, finish=lambda: ends.append(sampler.taken))
    assert len(list(zip(range(3), sampler, strict=False))) == 3
    assert ends == [3]


def test_passes_differ_in_order_and_repeat_by_seed() -> None:
    prompts = [f"prompt {number}" for number in range(50)]
    order = PromptOrder(prompts, 4).__getitems__(range(100))
    assert order == PromptOrder(prompts, 4).__getitems__(range(100))
    assert sorted(order.prompts[:50]) == sorted(order.prompts[50:]) == sorted(prompts)
    assert order.prompts[:50] != order.prompts[50:]
    assert len(set(order.keys)) == 100


FORMATS = Path(__file__).resolve().parents[1] / "formats" / "data"
TAGS = ["single_object", "counting", "position", "color_attr"]


@pytest.mark.parametrize(
    ("pattern", "number", "first", "groups"),
    [
        ("prompts/PartiPrompts.tsv", 4, "a lighthouse made of folded paper at dusk", ["Artifacts", "World Knowledge"]),
        ("prompts/geneval_metadata.jsonl", 4, "a photo of a kite", TAGS),
        ("prompts/lpo_training_prompts.json", 8, "a lighthouse made of folded paper at dusk", [""]),
        ("prompts/t2i_compbench_*_val.txt", 2, "a violet jar and a silver lamp", ["t2i_compbench_color"]),
        ("pickapic_v1/data/validation_unique*.parquet", 5, None, None),
        ("hpdv2/benchmark/[!d]*.json", 12, None, ["anime", "concept-art", "paintings", "photo"]),
    ],
)  # fmt: skip
def test_published_sets_of_prompts(pattern: str, number: int, first: str | None, groups: list[str] | None) -> None:
    rows = read_prompt_set(str(FORMATS / pattern))
    assert len(rows) == number
    assert first in (None, rows[0].prompt)
    assert groups in (None, list(dict.fromkeys(row.group for row in rows)))


def test_partiprompts_keep_their_quotes_and_geneval_its_fields() -> None:
    rows = read_prompt_set(str(FORMATS / "prompts" / "PartiPrompts.tsv"))
    assert rows[3].prompt == 'a sign that says "Stop" here'
    rows = read_prompt_set(str(FORMATS / "prompts" / "geneval_metadata.jsonl"))
    assert rows[1].fields["exclude"] == [{"class": "bowl", "count": 4}]


def test_a_set_keeps_repeated_prompts_and_names_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "b_val.txt").write_text("a cat\n\na cat\n")
    (tmp_path / "a.jsonl").write_text('{"prompt": "a dog", "tag": "counting"}\n')
    rows = read_prompt_set(f"{tmp_path}/*")
    assert [(row.prompt, row.group) for row in rows] == [("a dog", "counting"), ("a cat", "b"), ("a cat", "b")]
    (tmp_path / "c.txt").write_text("")
    with pytest.raises(InputError, match=r"c.txt holds no prompt"):
        read_prompt_set(f"{tmp_path}/*.txt")
    with pytest.raises(InputError, match=r"no file matches .*x\*; give a file"):
        read_prompt_set(f"{tmp_path}/x*")


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_prompts_carry_the_pictures_that_they_edit(suffix: str, tmp_path: Path, jpeg) -> None:
    for number, name in enumerate("ab"):
        (tmp_path / f"{name}.jpg").write_bytes(jpeg((90 * number, 9, 9)))
    lists: list[list[str]] = [["a.jpg"], ["b.jpg"], ["a.jpg"], ["a.jpg", "b.jpg"]]
    rows: list[dict[str, Any]] = [{"prompt": "make it red", "source_images": names} for names in lists]
    file = tmp_path / f"prompts.{suffix}"
    if suffix == "csv":
        cells = ["a.jpg", "b.jpg", '"[""a.jpg""]"', '"[""a.jpg"", ""b.jpg""]"']
        file.write_text("prompt,source_image\n" + "".join(f"make it red,{cell}\n" for cell in cells))
    elif suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    else:
        file.write_text(json.dumps(rows) if suffix == "json" else "".join(f"{json.dumps(row)}\n" for row in rows))
    prompts = PromptDataModule(str(file)).prompts
    names = [[source.image_key for source in sources_of(prompt)] for prompt in prompts]
    assert names == [["a.jpg"], ["b.jpg"], ["a.jpg", "b.jpg"]]
    assert {str(prompt) for prompt in prompts} == {"make it red"}
    assert decode_image(sources_of(prompts[1])[0]).size == (20, 12)
    assert not read_prompt_set(str(file))[0].fields.keys() & {"source_images", "source_image"}


def test_pictures_to_edit_may_be_bytes_in_parquet(tmp_path: Path, jpeg) -> None:
    pictures = [{"bytes": jpeg((90 * number, 9, 9)), "path": None} for number in range(2)]
    rows = [{"prompt": "make it red", "source_image": picture} for picture in pictures]
    pq.write_table(pa.Table.from_pylist([*rows, rows[0], {"prompt": "a cat"}]), tmp_path / "prompts.parquet")
    prompts = PromptDataModule(str(tmp_path / "prompts.parquet")).prompts
    assert [source.data for prompt in prompts for source in sources_of(prompt)] == [one["bytes"] for one in pictures]
    assert prompts[2] == "a cat"
