"""Curated forget and retain sets: who is matched, what is written, that it is reproducible and apart."""

import hashlib
import json
import tarfile
from pathlib import Path

import pytest
from curate_shards import CAPTIONS, image, pairs, tar, two_shards
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from expunge.cli import app
from expunge.data.curate import Columns, Rules, curate, find_shards
from expunge.data.curate.sources import expand_braces
from expunge.data.curate.uncanvas import caption, read_canvas
from expunge.errors import CapabilityError, ConfigError, DataError, RequestError

MUSK = Rules(names=("Elon Musk",))


def contents(path: Path) -> dict[str, bytes]:
    with tarfile.open(path, "r:") as archive:
        return {m.name: archive.extractfile(m).read() for m in archive}


def keys(path: Path) -> set[str]:
    return {name.rpartition(".")[0] for name in contents(path)}


def run(root: Path, out: Path, rules: Rules = MUSK, retain: list[str] | None = None, **options):
    shards = find_shards([root])
    return curate(shards, shards if retain is None else find_shards(retain), out, rules, **options)


def test_matches_whole_words_and_keeps_the_bytes(tmp_path):
    done = run(two_shards(tmp_path / "data"), tmp_path / "out")
    assert [t.pair.key for t in done.forget.taken] == ["00000", "00003", "00005", "00101"]
    forget = contents(tmp_path / "out/forget.tar")
    assert list(forget) == [f"{k}.{e}" for k in ("00000", "00003", "00005", "00101") for e in ("jpg", "txt")]
    assert forget["00003.jpg"] == image(3)
    assert forget["00003.txt"].decode() == CAPTIONS[3]
    assert (tmp_path / "out/retain.tar").read_bytes() != (tmp_path / "out/forget.tar").read_bytes()


def test_retain_lacks_forget_keys_captions_and_images(tmp_path):
    root = two_shards(tmp_path / "data")
    done = run(root, tmp_path / "out", Rules(names=("Elon Musk",), limit=2))
    assert [t.pair.key for t in done.forget.taken] == ["00000", "00003"]
    removed = {k: [where.split(": ")[1] for where in v] for k, v in done.retain.removed.items()}
    # Two are in the forget set, two more mention the name beyond the limit, one shows the same picture.
    assert removed == {"key": ["00000", "00003"], "caption": ["00005", "00101"], "image": ["00200"]}
    kept = contents(tmp_path / "out/retain.tar")
    forget_images = {hashlib.sha256(image(i)).hexdigest() for i in (0, 3)}
    assert not keys(tmp_path / "out/retain.tar") & keys(tmp_path / "out/forget.tar")
    assert not {hashlib.sha256(v).hexdigest() for v in kept.values()} & forget_images
    assert len(done.retain.taken) == 9 == len(kept) // 2
    other = run(root, tmp_path / "other", Rules(names=("cat",)))  # the same pairs stay where another name is forgotten
    assert {"00000", "00200"} <= {t.pair.key for t in other.retain.taken}


def test_equal_keys_of_different_shards_are_different_pairs(tmp_path):
    tar(tmp_path / "a.tar", pairs(["Elon Musk", "a cat"]))
    tar(tmp_path / "b.tar", [("00000.jpg", image(50)), ("00000.txt", b"a hut"), *pairs(["a dog"], first=1)])
    tar(tmp_path / "copy/a.tar", pairs(["Elon Musk", "a cat"]))
    retain = [str(tmp_path / "b.tar"), str(tmp_path / "copy/a.tar")]
    done = curate(find_shards([tmp_path / "a.tar"]), find_shards(retain), tmp_path / "out", MUSK)
    assert [len(v) for v in done.retain.removed.values()] == [1, 0, 0]
    names = keys(tmp_path / "out/retain.tar")
    assert len(names) == 3
    assert not names & keys(tmp_path / "out/forget.tar")


def test_twice_gives_the_same_bytes(tmp_path):
    root = two_shards(tmp_path / "data")
    first, second = tmp_path / "one", tmp_path / "two"
    run(root, first)
    (root / "00000.tar").touch()
    run(root, second)
    for name in ("forget.tar", "retain.tar", "index.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    run(root, second, Rules(names=("Elon Musk",), limit=3), overwrite=True)
    assert (first / "forget.tar").read_bytes() != (second / "forget.tar").read_bytes()
    with tarfile.open(first / "forget.tar") as archive:
        facts = {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in archive}
    assert facts == {(0, 0, 0, "", "", 0o644)}


def test_index_says_where_every_pair_is_from(tmp_path):
    rules = Rules(names=("Elon Musk", "Tesla"), limit=4)
    run(two_shards(tmp_path / "data"), tmp_path / "out", rules)
    index = json.loads((tmp_path / "out/index.json").read_text("utf-8"))
    row = index["forget"]["pairs"][2]
    assert row == {
        "key": "00005",
        "source": str(tmp_path / "data/00000.tar"),
        "source_key": "00005",
        "caption": CAPTIONS[5],
        "sha256": hashlib.sha256(image(5)).hexdigest(),
        "names": ["Elon Musk", "Tesla"],
    }
    for name, digest in index["sha256"].items():
        assert hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest() == digest
    assert {r["key"] for r in index["retain"]["pairs"]} == keys(tmp_path / "out/retain.tar")


def test_the_limit_ends_the_search(tmp_path):
    root = two_shards(tmp_path / "data")
    (root / "00002.tar").write_bytes(b"broken beyond repair")
    done = run(root, tmp_path / "out", Rules(names=("elon musk",), limit=3), retain=[str(root / "00001.tar")])
    assert (len(done.forget.taken), done.forget.looked_at, done.forget.complete) == (3, 6, False)
    with pytest.raises(DataError, match=r"00002\.tar"):
        run(root, tmp_path / "all", retain=[str(root / "00001.tar")])


def test_keys_with_dots_stay_whole(tmp_path):
    members = [("x/a.b.jpg", image(1)), ("x/a.b.txt", b"Elon Musk"), ("x/a.c.txt", b"a cat"), ("x/a.c.jpg", image(2))]
    tar(tmp_path / "d/s.tar", members)
    done = run(tmp_path / "d", tmp_path / "out")
    assert [t.pair.key for t in done.forget.taken] == ["x/a.b"]
    assert list(contents(tmp_path / "out/forget.tar")) == ["x_a_b.jpg", "x_a_b.txt"]
    assert list(contents(tmp_path / "out/retain.tar")) == ["x_a_c.jpg", "x_a_c.txt"]


def test_interleaved_members_are_put_together(tmp_path):
    tar(tmp_path / "d/s.tar", sorted(pairs(CAPTIONS), key=lambda m: m[0].rpartition(".")[2]))
    assert len(run(tmp_path / "d", tmp_path / "out").forget.taken) == 3


def test_extension_follows_the_content(tmp_path):
    members = [("a.jpg", image(1, "PNG")), ("a.txt", b"Elon Musk"), ("b.jpeg", image(2)), ("b.txt", b"a cat")]
    tar(tmp_path / "d/s.tar", members)
    run(tmp_path / "d", tmp_path / "out")
    assert list(contents(tmp_path / "out/forget.tar")) == ["a.png", "a.txt"]
    assert list(contents(tmp_path / "out/retain.tar")) == ["b.jpg", "b.txt"]


def test_nothing_matched_says_what_is_close(tmp_path):
    root = two_shards(tmp_path / "data")
    with pytest.raises(
        RequestError, match=r"none of 14 captions mentions 'Elon Mosk'; closest words: 'elon musk' \(4\)"
    ):
        run(root, tmp_path / "out", Rules(names=("Elon Mosk",)))
    assert not (tmp_path / "out").exists()


def test_folders_tables_and_parquet_give_the_same_pairs(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    plain, jsonl, table = (tmp_path / name for name in ("plain", "jsonl", "csv"))
    for folder in (plain, jsonl, table):
        (folder / "sub").mkdir(parents=True)
        for i in range(len(CAPTIONS)):
            (folder / f"sub/{i}.jpg").write_bytes(image(i))
    for i, text in enumerate(CAPTIONS):
        (plain / f"sub/{i}.txt").write_text(text, "utf-8")
    lines = [json.dumps({"file_name": f"sub/{i}.jpg", "text": t}) for i, t in enumerate(CAPTIONS)]
    (jsonl / "metadata.jsonl").write_text("\n".join(lines), "utf-8")
    rows = [f'sub/{i}.jpg,"{t}"' for i, t in enumerate(CAPTIONS)]
    (table / "metadata.csv").write_text("\n".join(["file_name,caption", *rows]), "utf-8")
    data = [image(i) for i in range(len(CAPTIONS))]
    columns = {
        "bytes": {"jpg": data, "key": [f"k{i}" for i in range(len(data))]},
        "struct": {"image": [{"bytes": d, "path": None} for d in data]},
        "path": {"image": [f"plain/sub/{i}.jpg" for i in range(len(data))]},
    }
    for name, column in columns.items():
        pq.write_table(pa.table({**column, "caption": CAPTIONS}), tmp_path / f"{name}.parquet", row_group_size=3)
    for source in (plain, jsonl, table, *(tmp_path / f"{name}.parquet" for name in columns)):
        shards = find_shards([source])
        done = curate(shards, shards, tmp_path / f"out-{source.name}", MUSK)
        found = {v for k, v in contents(done.folder / "forget.tar").items() if k.endswith("jpg")}
        assert found == {image(0), image(3), image(5)}, source
        assert len(done.retain.taken) == 5
    with pytest.raises(ConfigError, match="no column 'captions'; did you mean 'caption'"):
        find_shards([tmp_path / "bytes.parquet"], Columns(caption="captions"))[0].pairs()


def test_patterns(tmp_path):
    root = two_shards(tmp_path)
    assert [Path(s.name).name for s in find_shards([str(root / "{00000..00001}.tar")])] == ["00000.tar", "00001.tar"]
    both = [str(root / "*.tar"), str(root / "00001.tar"), str(root)]
    assert len(find_shards(both)) == 2
    with pytest.raises(DataError, match=r"2 of 4 shards do not exist: .*00002\.tar, .*00003\.tar"):
        find_shards([str(root / "{00000..00003}.tar")])
    with pytest.raises(DataError, match=r"neither a \.tar nor"):
        find_shards([root / "00000_stats.json"])
    assert expand_braces("a{8..11}{x,y}") == [f"a{n}{c}" for n in (8, 9, 10, 11) for c in "xy"]
    assert expand_braces("a{b}") == ["a{b}"]
    with pytest.raises(DataError, match="more than"):
        expand_braces("{0..9999}{0..9999}")


@settings(max_examples=25)
@given(st.lists(st.sampled_from(["a cat", "Elon Musk", "elon_musk and a cat", "musk"]), min_size=1, max_size=12))
def test_sides_are_a_partition(tmp_path_factory, texts):
    root = tmp_path_factory.mktemp("partition")
    tar(root / "d/s.tar", pairs(texts))
    expected = {f"{i:05d}" for i, t in enumerate(texts) if "usk" in t and t != "musk"}
    if not expected or len(expected) == len(texts):
        with pytest.raises((RequestError, DataError)):
            run(root / "d", root / "out")
        return
    run(root / "d", root / "out")
    forget, retain = keys(root / "out/forget.tar"), keys(root / "out/retain.tar")
    assert forget == expected
    assert retain == {f"{i:05d}" for i in range(len(texts))} - expected


def canvas(root: Path, per_cell: int = 2) -> Path:
    for s, style in enumerate(("Van_Gogh", "Sketch", "Artist_Sketch", "Seed_Images")):
        for o, obj in enumerate(("Dogs", "Cats")):
            (root / style / obj).mkdir(parents=True)
            for n in range(1, per_cell + 1):
                (root / style / obj / f"{n}.jpg").write_bytes(image(100 * s + 10 * o + n))
    return root


def test_uncanvas_divides_by_cell(tmp_path):
    found = read_canvas(canvas(tmp_path / "c"), "style", "sketch", per_cell=2)
    done = curate([found.forget], [found.retain], tmp_path / "out", Rules())
    texts = [v.decode() for k, v in contents(tmp_path / "out/forget.tar").items() if k.endswith("txt")]
    assert texts == ["A Cats image in Sketch style."] * 2 + ["A Dogs image in Sketch style."] * 2
    assert "Dogs_Sketch_1.jpg" in contents(tmp_path / "out/forget.tar")
    assert len(done.retain.taken) == 12
    assert not found.notes
    kept = contents(tmp_path / "out/retain.tar")
    assert kept["Dogs_Artist_Sketch_1.txt"].decode() == caption("Artist_Sketch", "Dogs")
    assert kept["Dogs_Seed_Images_1.txt"].decode() == "A Dogs image in Photo style."
    half = curate([found.forget], [found.retain], tmp_path / "half", Rules(retain_limit=6))
    assert {t.pair.key.rpartition("_")[2] for t in half.retain.taken} == {"1"}  # every cell before any second image


def test_uncanvas_objects_counts_and_errors(tmp_path):
    root = canvas(tmp_path / "c")
    found = read_canvas(root, "object", "dogs")
    assert len(found.forget.pairs()) == 8
    assert "Van_Gogh/Dogs has 2 images, expected 20" in found.notes
    with pytest.raises(RequestError, match="Seed_Images is not a style"):
        read_canvas(root, "style", "Seed Images")
    with pytest.raises(RequestError, match="did you mean 'Van_Gogh'"):
        read_canvas(root, "style", "van goh")
    with pytest.raises(DataError, match="laid out as"):
        read_canvas(root / "Van_Gogh", "style", "Dogs")


def cli(*words: str):
    return CliRunner().invoke(app, ["data", "curate", *words])


def test_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    two_shards(tmp_path / "data")
    result = cli("--name", "Elon_Musk", "--shards", "data/{00000..00001}.tar", "--limit", "3")
    assert result.exit_code == 0, result.output
    assert sorted(p.name for p in Path("curated/elon-musk").iterdir()) == ["forget.tar", "index.json", "retain.tar"]
    assert "forget" in result.output
    assert "curated/elon-musk/forget.tar" in result.output
    again = cli("--name", "Elon_Musk", "--shards", "data/{00000..00001}.tar")
    assert again.exit_code == 2
    assert "allow overwriting" in again.output
    assert cli("--name", "Elon_Musk", "--shards", "data", "--overwrite", "--no-retain").exit_code == 0
    assert not Path("curated/elon-musk/retain.tar").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--name", "x"], "give one of --shards"),
        (["--shards", "data"], "give the --name"),
        (["--shards", "data", "--name", "x", "--style", "y"], "--style belongs to --uncanvas"),
        (["--shards", "data", "--name", "x", "--n", "5"], "--n belongs to --synthesize"),
        (["--shards", "data", "--name", "x", "--limit", "0"], "limit must be at least 1"),
        (["--shards", "data", "--name", " _ "], "name to look for is empty"),
        (["--uncanvas", "c"], "either --style or --object"),
        (["--synthesize", "p"], "needs a --prompt"),
        (["--shards", "data", "--name", "cat", "--exclude-key", "0000x"], "no pair has the excluded key '0000x'"),
    ],
)
def test_command_refuses(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    two_shards(tmp_path / "data")
    result = cli(*words)
    assert result.exit_code == 2
    assert message in result.output
    assert not Path("curated").exists()


def test_command_divides_a_canvas(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    canvas(tmp_path / "c")
    result = cli("--uncanvas", "c", "--style", "Van Gogh")
    assert result.exit_code == 0, result.output
    assert "expected 20" in result.output
    assert len(keys(Path("curated/van-gogh/forget.tar"))) == 4
    index = json.loads(Path("curated/van-gogh/index.json").read_text("utf-8"))
    assert index["facts"] == {"mode": "uncanvas", "style": "Van_Gogh"}


def tiny_pipeline():
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from tokenizers import Tokenizer, models, trainers
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from expunge import rng

    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    words = ["iron", "man", *"abcdefghijklmnopqrstuvwxyz"]
    trained.train_from_iterator(words, trainers.BpeTrainer(vocab_size=200, end_of_word_suffix="</w>"))
    model = json.loads(trained.to_str())["model"]
    vocab = dict(model["vocab"])
    for mark in ("<|startoftext|>", "<|endoftext|>"):
        vocab[mark] = len(vocab)
    tokenizer = CLIPTokenizer(vocab=vocab, merges=[tuple(m) for m in model["merges"]], model_max_length=16)
    end = vocab["<|endoftext|>"]
    with rng.preserved():
        rng.seed_everything(0)
        config = CLIPTextConfig(
            vocab_size=len(vocab),
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=16,
            bos_token_id=vocab["<|startoftext|>"],
            eos_token_id=end,
            pad_token_id=end,
        )
        text = CLIPTextModel(config)
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 8),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=32,
            attention_head_dim=2,
            norm_num_groups=4,
        )
        vae = AutoencoderKL(
            block_out_channels=(8, 8),
            layers_per_block=1,
            norm_num_groups=4,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
        )
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    parts = {"vae": vae, "text_encoder": text, "tokenizer": tokenizer, "unet": unet, "scheduler": scheduler}
    return StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory) -> Path:
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("pipeline") / "tiny"
    tiny_pipeline().save_pretrained(folder)
    return folder


def test_synthetic_images_are_functions_of_seed_and_number(pipeline_folder):
    from expunge.data.curate.synthetic import load_pipeline, synthesize

    pipeline = load_pipeline(str(pipeline_folder), "cpu")
    draw = {n: [p.data() for p in synthesize(pipeline, "iron man", n, steps=2).pairs()] for n in (2, 3)}
    assert draw[3][:2] == draw[2]
    assert len(set(draw[3])) == 3
    assert synthesize(pipeline, "iron man", 1, steps=2, seed=1).pairs()[0].data() != draw[2][0]
    with pytest.raises(ConfigError, match="n >= 1"):
        synthesize(pipeline, "iron man", 0)


def test_command_synthesizes(tmp_path, monkeypatch, pipeline_folder):
    monkeypatch.chdir(tmp_path)
    two_shards(tmp_path / "data")
    options = ["--prompt", "iron man", "--n", "2", "--steps", "2", "--device", "cpu", "--retain-shards", "data"]
    for out in ("one", "two"):
        result = cli("--synthesize", str(pipeline_folder), *options, "--out", out)
        assert result.exit_code == 0, result.output
        assert "safety checker off" in result.output
    assert Path("one/forget.tar").read_bytes() == Path("two/forget.tar").read_bytes()
    found = contents(Path("one/forget.tar"))
    assert list(found) == ["iron_man_00000.png", "iron_man_00000.txt", "iron_man_00001.png", "iron_man_00001.txt"]
    assert found["iron_man_00001.txt"] == b"iron man"
    assert len(keys(Path("one/retain.tar"))) == 14


def test_without_diffusers(monkeypatch):
    import sys

    from expunge.data.curate.synthetic import load_pipeline

    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(CapabilityError, match=r"expunge\[diffusion\]"):
        load_pipeline("anything")
