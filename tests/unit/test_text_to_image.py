"""The text-to-image task on a tiny random pipeline: requests, captions, losses, states, samples."""

import copy

import pytest
import torch
from torch.testing import assert_close

from expunge import rng
from expunge.data.base import Splits
from expunge.data.canvas import canvas
from expunge.data.captions import Axis
from expunge.diffusion.asks import Ask
from expunge.diffusion.latents import BLOCK, Latents, decode, encode
from expunge.digest import model_digest
from expunge.errors import CapabilityError, ConfigError, DataError, RequestError
from expunge.models.pipelines import Parts
from expunge.request import ForgetRequest
from expunge.tasks.text_to_image import TextToImageTask
from expunge.tasks.tiny_text_to_image import tiny_parts, tiny_text_to_image

STAR = ForgetRequest.concept("star")


@pytest.fixture(scope="module")
def task():
    return tiny_text_to_image()


@pytest.fixture(scope="module")
def split(task):
    return task.split(STAR)


def batch_of(task, split, role="forget", n=4, key=5):
    from dataclasses import replace

    return replace(task.load(role, split[role][:n], split), key=key)


def test_a_class_by_name_goes_with_its_test_images(task, split):
    assert split.removed == (task.classes.index("star"),)
    assert all("star" in c for c in task.captions("forget", split["forget"]))
    assert not any("star" in c for c in task.captions("retain", split["retain"]))
    assert len(split["forget_test"]) == 6
    assert torch.equal(task.split(ForgetRequest.label("star"))["forget"], split["forget"])


def test_a_class_of_another_axis_is_refused_with_the_axis_to_set(task):
    with pytest.raises(RequestError, match=r"task\.axis to 'style'"):
        task.split(ForgetRequest.concept("neon"))
    assert tiny_text_to_image(axis="style").split(ForgetRequest.concept("neon")).removed == (4,)


def test_words_that_captions_use_and_words_they_do_not(task):
    split = task.split(ForgetRequest.concept("picture  of"))
    assert split.concept == "picture of"
    assert not split.removed
    assert task.concept_prompts(split) == ["picture of"]
    with pytest.raises(RequestError, match="did you mean"):
        task.split(ForgetRequest.concept("stan"))


def test_samples_stand_for_themselves_by_their_captions(task):
    split = task.split(ForgetRequest.samples([0, 1, 48 - 1]))
    prompts = task.concept_prompts(split)
    assert len(prompts) == len(set(prompts)) <= 3
    assert set(prompts) == {task.data.train.captions[i] for i in (0, 1, 47)}


def test_virtual_samples_take_the_concept_prompts_in_turn(task, split):
    prompts = task.concept_prompts(split)
    assert prompts[1] == "a star in outline style"
    batch = task.load("concept", torch.tensor([0, 1, 7, 7]), split)
    assert batch.captions == (prompts[0], prompts[1], prompts[1], prompts[1])
    assert batch.targets.tolist() == [3, 3, 3, 3]
    assert torch.equal(batch.inputs[2], batch.inputs[3])
    assert not torch.equal(batch.inputs[1], batch.inputs[2])
    again = task.load("concept", torch.tensor([7]), split)
    assert torch.equal(again.inputs[0], batch.inputs[2])
    with pytest.raises(CapabilityError, match="no denoising loss"):
        task.loss(batch)
    with pytest.raises(RequestError, match="give its split"):
        task.captions("concept", torch.tensor([0]))


def test_prompts_alone_have_the_role_concept_only():
    task = tiny_text_to_image(images=False)
    split = task.split(STAR)
    assert split.roles() == ("concept",)
    assert "forget" not in split
    assert len(task.load("concept", torch.arange(3), split)) == 3
    assert task.split(ForgetRequest.concept("Van_Gogh")).concept == "Van Gogh"
    with pytest.raises(RequestError, match="no images"):
        task.images_of("forget")
    with pytest.raises(RequestError, match="names a class or a concept"):
        task.split(ForgetRequest.samples([1]))


def test_latents_are_scaled_means_and_independent_of_the_batch(task, split):
    ids = split["forget"]
    batch = task.load("forget", ids, split)
    x = task.data.train.images(ids)
    wanted = task.parts.vae.encode(2 * x - 1).latent_dist.mean * task.parts.vae.config.scaling_factor
    assert_close(batch.inputs, wanted)
    assert torch.equal(task.load("forget", ids[2:3], split).inputs[0], batch.inputs[2])


def test_latents_are_read_from_the_folder_and_belong_to_one_autoencoder(tmp_path, task):
    images = task.data.train

    class Counting(type(task.parts.vae)):
        calls = 0

        def encode(self, x):
            Counting.calls += 1
            return super().encode(x)

    vae = copy.deepcopy(task.parts.vae)
    vae.__class__ = Counting
    ids, cpu = torch.tensor([3, 40]), torch.device("cpu")
    first = Latents(vae, images, "a", tmp_path)(ids, cpu)
    made = Counting.calls
    assert made == -(-min(BLOCK, len(images)) // 16)
    assert torch.equal(Latents(vae, images, "a", tmp_path)(ids, cpu), first)
    assert Counting.calls == made
    Latents(vae, images, "b", tmp_path)(ids, cpu)
    assert Counting.calls == 2 * made
    assert len(list(tmp_path.glob("*/*.safetensors"))) == 2


def test_decoding_is_the_inverse_scaling(task):
    x = torch.rand(2, 3, 32, 32)
    z = encode(task.parts.vae, x)
    assert_close(decode(task.parts.vae, z), (task.parts.vae.decode(z).sample / 2 + 0.5).clamp(0, 1))


def test_loss_is_the_mean_squared_error_of_the_noise(task, split):
    batch = batch_of(task, split)
    x_t, t, noise = task.drawn(batch)
    states = task.parts.text_encoder(task.text.token_ids(batch.captions)).last_hidden_state
    found = task.unet(x_t, t, encoder_hidden_states=states).sample
    assert_close(task.loss(batch), (found - noise).square().mean((1, 2, 3)))


def test_each_loss_is_its_samples_own(task, split):
    whole, alone = task.loss(batch_of(task, split)), task.loss(batch_of(task, split, n=2))
    assert_close(whole[:2], alone)
    assert not torch.allclose(whole[:2], task.loss(batch_of(task, split, n=2, key=6)))


def test_wrong_targets_exchange_the_name_in_the_caption(task, split):
    batch = batch_of(task, split)
    moon = torch.full_like(batch.targets, task.classes.index("moon"))
    texts = [c.replace("star", "moon") for c in batch.captions]
    assert torch.equal(task.condition(batch, moon), task.conditions(texts))
    assert torch.equal(task.condition(batch, batch.targets), task.condition(batch))
    assert not torch.equal(task.condition(batch, moon), task.condition(batch))
    assert task.renamed("a night sky", 3, 7) == task.prompt_of(7) == "a moon in flat style"
    with pytest.raises(RequestError, match="not probabilities"):
        task.loss(batch, torch.rand(4, 8))


def test_wrong_targets_are_uniform_over_the_others(task, split):
    batch = batch_of(task, split, n=6)
    drawn = torch.cat([task.wrong_target(batch, key=k) for k in range(400)])
    counts = torch.bincount(drawn, minlength=8)
    assert counts[3] == 0
    assert (counts[[0, 1, 2, 4, 5, 6, 7]] > 240).all()
    every = torch.cat([task.wrong_target(batch, key=k, exclude_true=False) for k in range(100)])
    assert (every == 3).any()


def test_states_are_the_pipelines_own_and_the_same_in_any_company(task):
    prompts = ["a star", "", "a neon moon"]
    states = task.states(prompts)
    own = torch.cat([task.parts.pipeline().encode_prompt(p, "cpu", 1, False)[0] for p in prompts])
    with torch.no_grad():
        found = task.states(prompts)
        assert torch.equal(found, own)
        assert torch.equal(task.states(prompts[2:])[0], found[2])
        assert torch.equal(task.unconditional(2)[1], found[1])
    assert_close(states, own)


def test_states_follow_the_weights(task):
    task = copy.deepcopy(task)
    with torch.no_grad():
        before = task.states(["a star"])
        weight = task.parts.text_encoder.get_parameter("encoder.layers.0.mlp.fc1.weight")
        weight.mul_(1.5)
        assert not torch.equal(task.states(["a star"]), before)
        weight.data = weight.data / 1.5
        assert_close(task.states(["a star"]), before)


def test_gradients_reach_the_text_encoder_only_when_it_is_trained(task, split):
    task = copy.deepcopy(task)
    task.loss(batch_of(task, split)).sum().backward()
    assert task.parts.text_encoder.get_parameter("encoder.layers.1.mlp.fc1.weight").grad.abs().sum() > 0
    task.model.zero_grad()
    task.parts.text_encoder.requires_grad_(False)
    assert not task.states(["a star"]).requires_grad
    task.loss(batch_of(task, split)).sum().backward()
    assert task.parts.text_encoder.get_parameter("encoder.layers.1.mlp.fc1.weight").grad is None
    assert task.unet.conv_in.weight.grad.abs().sum() > 0


def test_states_keep_the_precision_of_a_half_pipeline():
    """A run holds the weights in float32; the states stay those that the U-Net receives when the pipeline is used."""
    task = tiny_text_to_image(images=False)
    task.model.bfloat16()
    task = TextToImageTask(task.parts, axes=task.axes)
    with torch.no_grad():
        shipped = task.states(["a star"])
        for p in task.model.parameters():
            p.data = p.data.float()
        during = task.states(["a star"])
    assert shipped.dtype == torch.bfloat16
    assert torch.equal(during, shipped)
    assert task.eps(torch.zeros(1, 4, 8, 8), torch.zeros(1, dtype=torch.int64), during).dtype == torch.float32


def test_dropout_does_not_touch_the_states(task):
    task = copy.deepcopy(task)
    before = task.states(["a star"])
    task.parts.text_encoder.config.attention_dropout = 0.5
    for layer in task.parts.text_encoder.encoder.layers:
        layer.self_attn.dropout = 0.5
    task.model.train()
    assert torch.equal(task.states(["a star"]), before)
    assert task.parts.text_encoder.training


def test_long_prompts_are_cut_with_a_warning(caplog):
    task = tiny_text_to_image(images=False)
    with caplog.at_level("WARNING", "expunge"):
        ids = task.text.token_ids(["a star " * 30, "a moon"])
        task.text.token_ids(["a star " * 30])
    assert ids.shape == (2, 16)
    (record,) = caplog.records
    assert record.message.startswith("prompts are cut after 16 tokens, as this pipeline always does; first '")
    own = task.parts.tokenizer(["a star " * 30, "a moon"], padding="max_length", truncation=True, return_tensors="pt")
    assert torch.equal(ids, own.input_ids)


def asks(*prompts, seed=3):
    return [Ask(p, seed, i) for i, p in enumerate(prompts)]


def test_samples_are_those_of_the_pipeline(task):
    """diffusers' own pipeline with the same noise draws the same images."""
    from expunge.diffusion.asks import first_noise

    own = asks("a star", "a neon moon")
    pipeline = task.parts.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    wanted = pipeline(
        [a.prompt for a in own],
        latents=first_noise(own, task.latent_shape),
        num_inference_steps=4,
        guidance_scale=3.0,
        output_type="pt",
    ).images
    assert_close(task.sample(own), wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(task.sample(own, guidance=1.0), wanted, atol=1e-3)


def test_an_image_is_a_function_of_its_ask(task):
    before, mode = model_digest(task.model), task.model.training
    three = task.sample(asks("a star", "a moon", "a ring"))
    assert three.shape == (3, 3, 32, 32)
    assert three.min() >= 0
    assert three.max() <= 1
    assert_close(task.sample(asks("a star", "a moon", "a ring")[1:]), three[1:], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(task.sample(asks("a star", seed=4)), three[:1], atol=1e-3)
    assert model_digest(task.model) == before
    assert task.model.training == mode


def test_schedulers_that_draw_noise_draw_it_per_image(task):
    import diffusers

    config = task.parts.scheduler.config
    noisy = Parts(**{**vars(task.parts), "scheduler": diffusers.DDPMScheduler.from_config(config)})
    own = TextToImageTask(noisy, axes=task.axes, steps=3, guidance=2.0)
    both = own.sample(asks("a star", "a moon"))
    assert_close(own.sample(asks("a star", "a moon")[1:]), both[1:], rtol=1e-4, atol=1e-5)


def test_velocities_are_turned_into_noise(task):
    """``v = sqrt(a) e - sqrt(1 - a) x_0``: with the true velocity the predicted noise is the noise."""
    own = TextToImageTask(Parts(**{**vars(task.parts), "predicts": "v_prediction"}), axes=task.axes)
    x0, noise, t = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([10, 700])
    a = own.process.alphas_cumprod[t].float().reshape(-1, 1, 1, 1)

    class Oracle(torch.nn.Module):
        dtype = torch.float32

        def forward(self, x, t, encoder_hidden_states):
            from types import SimpleNamespace

            return SimpleNamespace(sample=a.sqrt() * noise - (1 - a).sqrt() * x0)

    own.unet = Oracle()
    states = own.states(["a star", "a moon"])
    assert_close(own.eps(own.process.noised(x0, noise, t), t, states), noise, atol=1e-5, rtol=1e-5)


def test_xl_gets_the_pooled_text_and_says_so_when_it_is_missing():
    task = tiny_text_to_image(kind="xl")
    split = task.split(STAR)
    states, conditions = task.states(["a star"]), task.conditions(["a star"])
    assert states.shape == (1, 16, 128)
    assert conditions.shape == (1, 17, 128)
    own = task.parts.pipeline()
    embeds, _, pooled, _ = own.encode_prompt("a star", device="cpu", do_classifier_free_guidance=False)
    assert_close(states, embeds)
    assert_close(task.text.unpack(conditions)[1], pooled)
    assert not task.text.empty(2).any()
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([5])
    with pytest.raises(RequestError, match="conditions"):
        task.eps(x, t, states)
    other = conditions.clone()
    other[:, -1] += 1
    assert not torch.allclose(task.eps(x, t, other), task.eps(x, t, conditions), atol=1e-5)
    assert torch.isfinite(task.loss(batch_of(task, split))).all()


def test_xl_samples_are_those_of_the_pipeline():
    from expunge.diffusion.asks import first_noise

    task = tiny_text_to_image(kind="xl", images=False)
    pipeline = task.parts.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    own = asks("a star")
    wanted = pipeline(
        "a star",
        latents=first_noise(own, task.latent_shape),
        num_inference_steps=4,
        guidance_scale=3.0,
        output_type="pt",
    ).images
    assert_close(task.sample(own), wanted, rtol=1e-4, atol=1e-5)


def test_default_asks_name_what_they_show(task):
    assert len(task.asks) == 48
    ask = task.asks[6 * task.classes.index("star") + 4]
    assert ask.prompt == "a star in neon style"
    assert ask.labels == {"object": 3, "style": 4}
    given = TextToImageTask(task.parts, axes=task.axes, asks=[Ask("a moon", 1, 0), Ask("a moon", 1, 1, {"object": 2})])
    assert [a.labels for a in given.asks] == [{"object": 7}, {"object": 2}]


def test_observing_draws_the_same_noise_and_sorts_by_what_was_asked():
    task = tiny_text_to_image(images=False, judged=True)
    split = task.split(STAR)
    seen = task.observe(split)
    assert seen.outputs["forget"].labels.tolist() == [3]
    assert seen.outputs["test"].labels.tolist() == [0, 1, 2, 4, 5, 6, 7]
    assert torch.equal(seen.extra.images, task.observe(split).extra.images)
    words = task.observe(task.split(ForgetRequest.concept("a moon")))
    assert words.outputs["forget"].labels.tolist() == [7]
    assert len(words.outputs["test"].labels) == 7


def test_a_run_is_evaluated_by_what_it_draws():
    from expunge.evaluation import Candidate, evaluate
    from expunge.method import build_recipe
    from expunge.run import unlearn

    task = tiny_text_to_image(n_train=48, judged=True)
    recipe = build_recipe({"method": "gradient_ascent", "optim": {"max_steps": 1, "lr": 1e-3}})
    patch = unlearn(task, STAR, recipe)
    report = evaluate(task, STAR, [Candidate("gradient_ascent", patch)], attacks=())
    rows = {r.name: r.metrics for r in report.rows}
    assert {"gen_ua", "gen_ira", "gen_cra", "fid_real"} <= set(rows["gradient_ascent"])
    assert report.samples is not None
    assert any(row.forgotten for row in report.samples.rows)


def test_without_a_judge_images_are_compared_and_ua_ira_and_cra_are_not_run(tmp_path):
    from expunge.evaluation import Candidate, evaluate
    from expunge.method import build_recipe
    from expunge.report.model import Report
    from expunge.run import unlearn

    task = tiny_text_to_image(images=False)
    patch = unlearn(task, STAR, build_recipe("uce"))
    report = evaluate(task, STAR, [Candidate("uce", patch)], attacks=())
    for row in report.rows:
        for key in ("gen_ua", "gen_ira", "gen_cra", "gen_cra_all"):
            assert row.metrics[key].note.startswith("no judge"), (row.name, key)
        assert "ua" not in row.metrics
    assert report.samples.metrics[1]["fid"].note == "no judge, so no features"
    assert report.samples.metrics[1]["pair_mse"].ran
    assert report.samples.judge == ""
    assert {s.seen for row in report.samples.rows for cell in row.cells for s in cell} == {""}
    assert report.samples.named == "star"
    assert any(row.forgotten for row in report.samples.rows)
    report.save_html(tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert "not run: no judge" in page
    assert "a judge, a separate model" not in page
    report.save_json(tmp_path / "r.json")
    assert Report.load_json(tmp_path / "r.json").samples == report.samples


def test_a_judge_that_does_not_fit_is_refused():
    judged = tiny_text_to_image(images=False, judged=True)
    judged.axes["style"] = Axis(torch.zeros(1, dtype=torch.int64), ("plain", "fancy"))
    with pytest.raises(CapabilityError, match="axis 'style'"):
        judged.observe(judged.split(STAR))
    judged.axis = "colour"
    with pytest.raises(CapabilityError, match="needs a judge of the axis 'colour'; this one knows object, style"):
        judged.check_judge()


def test_data_that_do_not_fit_are_refused():
    parts = tiny_parts()
    small = canvas(48, 48, 0, 16)
    with pytest.raises(DataError, match=r"set data\.resize to 32"):
        TextToImageTask(parts, small)
    assert TextToImageTask(parts, small, side=16).latent_shape == (4, 4, 4)
    with pytest.raises(ConfigError, match="multiple of 4"):
        TextToImageTask(parts, small, side=18)
    with pytest.raises(DataError, match="no label axis"):
        TextToImageTask(parts, canvas(48, 48), axis="colour")
    with pytest.raises(DataError, match="no captions"):
        TextToImageTask(parts, Splits("plain", small.train.base, small.test.base))
    with pytest.raises(DataError, match="captioned images, or label axes"):
        TextToImageTask(parts)


def test_the_data_digest_sees_captions_autoencoder_and_seed(task):
    digest = task.data_digest()
    assert tiny_text_to_image().data_digest() == digest
    assert tiny_text_to_image(axis="style").data_digest() != digest
    other = TextToImageTask(task.parts, task.data, seed=1)
    assert other.data_digest() != digest
    vae = copy.deepcopy(task.parts.vae)
    with torch.no_grad():
        vae.quant_conv.bias += 1
    assert TextToImageTask(Parts(**{**vars(task.parts), "vae": vae}), task.data).data_digest() != digest


def test_building_leaves_torchs_random_state_alone():
    torch.manual_seed(0)
    wanted = torch.rand(1)
    torch.manual_seed(0)
    tiny_parts(3)
    assert torch.equal(torch.rand(1), wanted)
    assert rng.key(0, "a") == rng.key(0, "a")
