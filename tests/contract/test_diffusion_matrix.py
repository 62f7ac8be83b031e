"""SalUn and BARRIER on diffusion models: every family, base loss and kind of request runs, or says what to do."""

import copy

import contract_helpers as contract
import pytest
from contract_helpers import short

from expunge.errors import CapabilityError, ConfigError, RequestError
from expunge.request import ForgetRequest
from expunge.run import unlearn
from expunge.tasks.tiny import tiny_classifier
from expunge.tasks.tiny_ddpm import tiny_ddpm
from expunge.tasks.tiny_text_to_image import tiny_text_to_image

LOSSES = ("gradient_ascent", "random_label", "esd")
#: A word that half of the captions have and that is no class.
WORD = "image"
REQUESTS = {"object": "star", "style": "neon", "words": WORD}
SMALL = {"batch_size": 8}
ATTENTION = {"ddpm": ["to_q", "to_k"], "text_to_image": ["attn2.to_q", "attn2.to_k", "attn2.to_v"]}
METHODS = {
    "ddpm": {"salun": SMALL, "ddpm_salun": SMALL, "barrier": SMALL | {"targets": ATTENTION["ddpm"], "draws": 2}},
    "text_to_image": {
        "salun": SMALL,
        "t2i_salun": SMALL | {"parameters": "x"},
        "barrier": SMALL | {"targets": ATTENTION["text_to_image"], "floor": 0.01, "draws": 2},
    },
}


@pytest.fixture(scope="module")
def tasks():
    drawn = {"object": tiny_text_to_image(), "style": tiny_text_to_image(axis="style")}
    return {
        "ddpm": tiny_ddpm(8, toy=True),
        **drawn,
        "words": drawn["object"],
        "prompts": tiny_text_to_image(images=False),
    }


@pytest.mark.parametrize("on", LOSSES)
@pytest.mark.parametrize("name", METHODS["ddpm"])
def test_class_conditional(tasks, name, on):
    recipe = short(name, METHODS["ddpm"][name] | {"on": on}, lr=1e-3)
    contract.comes_off(copy.deepcopy(tasks["ddpm"]), ForgetRequest.label("cat"), recipe)


@pytest.mark.parametrize("name", METHODS["ddpm"])
def test_class_conditional_models_know_no_words(tasks, name):
    with pytest.raises(RequestError):
        unlearn(tasks["ddpm"], ForgetRequest.concept("fur"), short(name, METHODS["ddpm"][name]))


@pytest.mark.parametrize("asked", REQUESTS)
@pytest.mark.parametrize("on", LOSSES)
@pytest.mark.parametrize("name", METHODS["text_to_image"])
def test_text_to_image(tasks, name, on, asked):
    settings = METHODS["text_to_image"][name] | {"on": on}
    task, request = copy.deepcopy(tasks[asked]), ForgetRequest.concept(REQUESTS[asked])
    if asked == "words" and on == "random_label" and name != "t2i_salun":
        with pytest.raises(RequestError, match="pseudo: retain"):
            unlearn(task, request, short(name, settings, lr=1e-3))
        settings |= {"pseudo": "retain"}
    recipe = short(name, settings, lr=1e-3)
    contract.comes_off(task, request, recipe)
    patch = unlearn(task, request, recipe)
    assert all(n.startswith("unet.") for n in patch.changes), "text encoders are not trained"
    if name != "salun":
        assert all("attn2" in n for n in patch.changes)


@pytest.mark.parametrize("on", LOSSES)
@pytest.mark.parametrize("name", METHODS["text_to_image"])
def test_prompts_alone_are_refused_with_the_way_out(tasks, name, on):
    recipe = short(name, METHODS["text_to_image"][name] | {"on": on})
    with pytest.raises(RequestError, match="expunge generate"):
        unlearn(tasks["prompts"], ForgetRequest.concept("nudity"), recipe)


@pytest.mark.parametrize(
    ("family", "name", "settings", "error", "text"),
    [
        ("object", "t2i_salun", {"on": "esd", "pseudo": "next"}, ConfigError, "no effect"),
        ("object", "t2i_salun", {"eta": 2.0}, ConfigError, "belongs to 'esd'"),
        ("object", "t2i_salun", {"parameters": "attn9"}, ConfigError, "unknown set"),
        ("object", "barrier", {"on": "gradient_ascent", "pseudo": "next"}, ConfigError, "no effect"),
        ("object", "barrier", {"targets": ["text_encoder"]}, RequestError, "text encoder only"),
        (
            "object",
            "barrier",
            {"targets": ["attn2.to_k"], "pseudo": {"stair": "a"}},
            RequestError,
            "did you mean|known",
        ),
        (
            "object",
            "barrier",
            {"targets": ["attn2.to_k"], "pseudo": {"ring": "a"}},
            RequestError,
            "no prompt for: star",
        ),
        ("words", "t2i_salun", {"pseudo": "next"}, RequestError, "is none"),
        ("words", "t2i_salun", {"profile": "as_published"}, RequestError, "is none"),
        ("ddpm", "barrier", {"targets": ["to_k"], "pseudo": ["a dog"]}, CapabilityError, "text-to-image"),
        ("ddpm", "ddpm_salun", {"on": "esd", "profile": "as_published"}, ConfigError, "no ESD"),
        ("ddpm", "salun", {"soft": True, "targets": ["conv_in"]}, ConfigError, "no effect"),
    ],
)
def test_what_cannot_be_meant_is_refused(tasks, family, name, settings, error, text):
    asked = ForgetRequest.label("cat") if family == "ddpm" else ForgetRequest.concept(REQUESTS[family])
    with pytest.raises(error, match=text):
        unlearn(copy.deepcopy(tasks[family]), asked, short(name, SMALL | settings))


def test_a_classifier_is_refused():
    task = tiny_classifier(steps=0)
    for name in ("t2i_salun", "ddpm_salun"):
        with pytest.raises(CapabilityError, match="needs diffusion"):
            unlearn(task, ForgetRequest.label("ant"), short(name, {}))
    with pytest.raises(CapabilityError, match="needs diffusion"):
        unlearn(task, ForgetRequest.label("ant"), short("barrier", {"on": "esd", "targets": ["fc"]}))
    with pytest.raises(RequestError, match="'draws' would have no effect"):
        unlearn(task, ForgetRequest.label("ant"), short("barrier", {"draws": 2, "targets": ["fc"]}))
