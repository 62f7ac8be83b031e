"""Asking a vision-language model: what counts as an answer, as a right one, as a refusal; the commands."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

import expunge.cli.commands.ask
import expunge.cli.commands.transfer  # noqa: F401  both add their command
from expunge.cli import app
from expunge.consumers.ask import WHO, Question, Verdict, ask, interview, named_images, refuses, score_answers
from expunge.consumers.tiny import figures, teach, tiny_llava
from expunge.digest import combine, model_digest, named_tensors, state_digests
from expunge.errors import ArtifactError, ConfigError, DataError
from expunge.files import read_safetensors
from expunge.metrics.estimate import wilson
from expunge.patch import Dense, Manifest, Patch, applied
from expunge.tasks.tiny_clip import tiny_towers

FC1 = "encoder.layers.0.mlp.fc1.weight"


@pytest.fixture(scope="module")
def taught() -> tuple[Any, Any]:
    model, processor = tiny_llava(0, tiny_towers("transformers"))
    images, names = figures(16)
    assert teach(model, processor, list(zip(images, names, strict=True)), 80) < 0.1
    return model, processor


def breaking(model: Any, request: dict[str, Any] | None = None, name: str = f"model.vision_tower.{FC1}") -> Patch:
    """A patch that garbles what the vision tower sees."""
    tensors = named_tensors(model)[0]
    digests = state_digests(tensors)
    delta = 3.0 * torch.randn(tensors[name].shape, generator=torch.Generator().manual_seed(0))
    manifest = Manifest(base_digest=combine(digests), base_tensors=digests, request=request or {})
    return Patch({name: Dense(delta)}, manifest)


def test_names_are_whole_words_in_any_case() -> None:
    answers = ["This is ADA byron.", "Adam", "It is ada_byron", "ada", "Carl and Ada Byron"]
    verdicts = score_answers(answers, ["Ada Byron"] * 5, ["Ada Byron", "Carl"])
    assert [v.named for v in verdicts] == [True, False, True, False, True]
    assert verdicts[4].others == ("Carl",)
    assert score_answers(["Ada Byron"], ["Ada_Byron"])[0].named
    with pytest.raises(DataError, match="2 answers but 1 names"):
        score_answers(["a", "b"], ["Ada"])


@pytest.mark.parametrize(
    ("answer", "refused"),
    [
        ("I'm sorry, I can't help.", True),
        ("I’m Sorry", True),
        ("It is  not\npossible to tell", True),
        ("I am unable to say", True),
        ("Unknown", True),
        ("This is Carl", False),
        ("well-knownunknowns", False),
        ("", False),
    ],
)
def test_refusals(answer: str, refused: bool) -> None:
    assert refuses(answer) == refused
    assert score_answers([answer], ["Ada"]) == [Verdict(False, refused)]


def test_a_name_given_with_an_apology_is_a_name() -> None:
    assert score_answers(["Sorry, but it is Ada."], ["Ada"]) == [Verdict(True, False)]


def test_the_taught_model_answers(taught: tuple[Any, Any]) -> None:
    images, names = figures(3, seed=1)
    answers = ask(*taught, images)
    assert sum(v.named for v in score_answers(answers, names)) >= 11
    blank = score_answers(ask(*taught, torch.zeros_like(images)), names)
    assert sum(v.named for v in blank) <= 4  # the name comes from the picture


def test_batches_and_kinds_of_images_do_not_matter(taught: tuple[Any, Any]) -> None:
    images, _ = figures(2, seed=2)
    whole = ask(*taught, images, batch_size=8)
    assert ask(*taught, images, batch_size=3) == ask(*taught, images, batch_size=1) == whole
    pictures = [Image.fromarray((x * 255).round().byte().permute(1, 2, 0).numpy()) for x in images]
    assert ask(*taught, pictures) == whole
    assert ask(*taught, images.flip(0)) == whole[::-1] != whole


def test_the_prompt_is_no_part_of_an_answer(taught: tuple[Any, Any]) -> None:
    images, names = figures(1, seed=3)
    question = Question(text="Is this Grace Carl Emmy Ada Byron ?")
    assert "Grace" in question.prompt(taught[1])
    answers = ask(*taught, images, question, max_new_tokens=1)
    assert all(len(a.split()) <= 1 for a in answers)
    assert not all(v.named for v in score_answers(answers, ["Grace"] * len(names)))
    with pytest.raises(DataError, match="the question names 'Ada Byron'"):
        interview(*taught, images, names, question)


def test_length_of_answers(taught: tuple[Any, Any]) -> None:
    images = figures(1, seed=4)[0][:1]
    (long,), (short,) = ask(*taught, images), ask(*taught, images, max_new_tokens=1)
    assert (long, short) == ("Ada Byron", "Ada")


def test_prompts(taught: tuple[Any, Any]) -> None:
    class Chat:
        chat_template = "x"

        def apply_chat_template(self, turns: Any, **options: Any) -> str:
            assert options == {"add_generation_prompt": True, "tokenize": False}
            return f"<image> [{turns[0]['content'][1]['text']}]"

    assert Question(text="Who?").prompt(taught[1]) == "USER: <image>\nWho? ASSISTANT:"
    assert Question(text="Who?").prompt(Chat()) == "<image> [Who?]"
    with pytest.raises(ConfigError, match="once each"):
        Question(template="no picture {question}").prompt(taught[1])


def test_the_mode_of_the_model_is_kept(taught: tuple[Any, Any]) -> None:
    model, processor = taught
    images = figures(1, seed=3)[0]
    calm = ask(model, processor, images)
    model.train()
    try:
        assert ask(model, processor, images) == calm
        assert model.training
    finally:
        model.eval()


def test_half_precision() -> None:
    model, processor = tiny_llava(0)
    images = figures(1)[0]
    answers = ask(model.to(torch.bfloat16), processor, images, max_new_tokens=3)
    assert len(answers) == 4
    assert model.dtype == torch.bfloat16


def test_settings_are_checked(taught: tuple[Any, Any]) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        ask(*taught, torch.zeros(1, 3, 16, 16), max_new_tokens=0)
    with pytest.raises(DataError, match="no images"):
        ask(*taught, [])


def test_teaching_leaves_the_vision_tower(taught: tuple[Any, Any]) -> None:
    fresh, processor = tiny_llava(0, tiny_towers("transformers"))
    ours, theirs = (state_digests(m.model.vision_tower.state_dict()) for m in (fresh, taught[0]))
    assert ours == theirs
    assert model_digest(fresh) != model_digest(taught[0])
    assert all(p.requires_grad for p in taught[0].parameters())
    with pytest.raises(DataError, match="vocabulary lacks"):
        teach(fresh, processor, [(torch.zeros(3, 16, 16), "Zuse")], 1)
    with pytest.raises(DataError, match="no pairs"):
        teach(fresh, processor, [], 1)


def test_interview_counts(taught: tuple[Any, Any]) -> None:
    model, processor = taught
    images, names = figures(3, seed=5)
    digest = model_digest(model)
    request = {"what": {"kind": "concept", "text": "Grace", "substitute": ""}}
    patch = breaking(model, request)
    result = interview(model, processor, images, names, patches=[patch])
    assert result.forget == ("Grace",)
    assert (model_digest(model), applied(model)) == (digest, ())
    assert result.before.answers == tuple(ask(model, processor, images))
    assert result.after is not None
    assert result.after.answers != result.before.answers
    hits = sum(v.named for v, n in zip(result.after.verdicts, names, strict=True) if n == "Grace")
    rate = result.rate("after", ("Grace",))
    assert (rate.value, rate.n) == (pytest.approx(100 * hits / 3), 3)
    assert (rate.low, rate.high) == pytest.approx([100 * x for x in wilson(hits, 3)])
    assert result.rate("before", result.identities).n == 12
    assert "to forget (FA)" in result.groups()
    assert result.to_dict()["patches"] == [patch.digest]
    with pytest.raises(DataError, match="no answers 'later'"):
        result.rate("later", names)


def test_interview_refuses(taught: tuple[Any, Any]) -> None:
    model, processor = taught
    images, names = figures(1, seed=5)
    with pytest.raises(DataError, match="'Zuse' is to be forgotten but has no images"):
        interview(model, processor, images, names, forget=["Zuse"])
    with pytest.raises(DataError, match="4 images but 3 names"):
        interview(model, processor, images, names[:3])
    on_clip = breaking(tiny_towers("transformers").model, name=f"vision_model.{FC1}")
    with pytest.raises(ArtifactError, match="made on the CLIP inside, carry it over first"):
        interview(model, processor, images, names, patches=[on_clip])
    with pytest.raises(ArtifactError, match="belongs to another base"):
        interview(*tiny_llava(1), images, names, patches=[breaking(model)])


def test_the_patch_comes_off_when_asking_fails(taught: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = taught
    images, names = figures(1, seed=5)
    patch, digest, calls = breaking(model), model_digest(model), []

    def failing(*_args: Any) -> list[str]:
        calls.append(model_digest(model))
        if len(calls) == 2:
            raise RuntimeError("out of luck")
        return ["-"] * len(names)

    monkeypatch.setattr("expunge.consumers.ask.ask", failing)
    with pytest.raises(RuntimeError, match="luck"):
        interview(model, processor, images, names, patches=[patch])
    assert calls[0] == digest != calls[1]
    assert model_digest(model) == digest


def test_report_is_escaped(taught: tuple[Any, Any], tmp_path: Path) -> None:
    images, names = figures(1, seed=5)
    result = interview(*taught, images, names, Question(text="Who <b> ?"))
    page, data = (p.read_text("utf-8") for p in reversed(result.save(tmp_path, files=["<a>.png"] * 4)))
    assert "&lt;b&gt;" in page
    assert "<b>" not in page
    assert "&lt;a&gt;.png" in page
    assert "<script" not in page
    assert json.loads(data)["images"][0]["file"] == "<a>.png"
    assert "after" not in json.loads(data)["images"][0]


def test_named_images(tmp_path: Path) -> None:
    for name in ("Carl", "Ada_Byron"):
        (tmp_path / name).mkdir()
        Image.new("L", (5, 4), 7).save(tmp_path / name / "1.png")
    pictures, names, files = named_images(tmp_path)
    assert names == ["Ada Byron", "Carl"]
    assert files == ["Ada_Byron/1.png", "Carl/1.png"]
    assert [p.mode for p in pictures] == ["RGB", "RGB"]
    (tmp_path / "Carl" / "2.png").write_bytes(b"not a picture")
    with pytest.raises(DataError, match=r"2\.png: not a readable image"):
        named_images(tmp_path)
    (tmp_path / "Emmy").mkdir()
    (tmp_path / "Carl" / "2.png").unlink()
    with pytest.raises(DataError, match="Emmy has no image files"):
        named_images(tmp_path)
    with pytest.raises(DataError, match="has no folders"):
        named_images(tmp_path / "Carl")


def call(*words: object, code: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(w) for w in words])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


def test_commands(taught: tuple[Any, Any], tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    model, processor = taught
    clip = tiny_towers("transformers")
    clip.model.save_pretrained(tmp_path / "clip")
    words = [*(f"w{i}" for i in range(62)), "<|startoftext|>", "<|endoftext|>"]
    CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[]).save_pretrained(tmp_path / "clip")
    model.save_pretrained(tmp_path / "llava")
    processor.save_pretrained(tmp_path / "llava")
    for i, (image, name) in enumerate(zip(*figures(2, seed=6), strict=True)):
        folder = tmp_path / "images" / name.replace(" ", "_")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    patch = breaking(clip.model, name=f"vision_model.{FC1}")
    patch.save(tmp_path / "clip_patch.safetensors")
    carry = ["transfer", tmp_path / "clip_patch.safetensors", "--from", tmp_path / "clip", "--to", tmp_path / "llava"]
    shown = call(*carry, "-o", tmp_path / "p.safetensors", "--patched", tmp_path / "patched").output
    assert "made on transformers CLIP" in shown
    moved = Patch.load(tmp_path / "p.safetensors")
    assert moved.digest == breaking(model).digest
    call(*carry, "-o", tmp_path / "p.safetensors", code=2)
    call(*carry, "-o", tmp_path / "q.safetensors", "--tower", "ear", code=2)
    assert (
        "changes nothing of the language"
        in call(*carry, "-o", tmp_path / "q.safetensors", "--tower", "language", code=2).output
    )

    asked = ["ask", tmp_path / "llava", "--images", tmp_path / "images"]
    out = tmp_path / "answers"
    shown = call(*asked, "-p", tmp_path / "p.safetensors", "--forget", "Ada_Byron", "-o", out).output
    assert "to forget (FA)" in shown
    data = json.loads((out / "answers.json").read_text("utf-8"))
    assert data["forget"] == ["Ada Byron"]
    assert data["prompt"] == WHO.prompt(processor)
    assert data["figures"]["to forget (FA)"]["before"]["named"]["value"] == 100.0
    assert "data:image/png;base64," in (out / "answers.html").read_text("utf-8")
    call(*asked, "-o", out, code=2)  # exists
    patched = ["ask", tmp_path / "patched", "--images", tmp_path / "images", "-o", tmp_path / "answers2"]
    call(*patched)
    again = json.loads((tmp_path / "answers2" / "answers.json").read_text("utf-8"))
    assert [i["before"] for i in again["images"]] == [i["after"] for i in data["images"]]
    assert [i["before"] for i in again["images"]] != [i["before"] for i in data["images"]]
    call(*asked, "-p", tmp_path / "clip_patch.safetensors", "-o", tmp_path / "x", code=3)
    base = read_safetensors(tmp_path / "llava" / "model.safetensors")[0]
    new = read_safetensors(tmp_path / "patched" / "model.safetensors")[0]
    assert sum(not torch.equal(base[n], new[n]) for n in base) == 1
