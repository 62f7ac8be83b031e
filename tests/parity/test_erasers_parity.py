"""Golden numbers of the parameter sets, Ablating Concepts, Forget-Me-Not and the SRS-ME repository's versions."""

from __future__ import annotations

import hashlib
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from eraser_files import Case, agree, cases, eps_of, gradients

from expunge.diffusion import ablation, forget_me_not
from expunge.diffusion.attention_maps import cross_attention_maps, uniform_norm
from expunge.diffusion.parameter_sets import published_names, select, size
from expunge.errors import RequestError


@pytest.mark.parametrize("path", cases("parameter-sets"))
def test_parameter_sets(path: Path) -> None:
    from diffusers import UNet2DConditionModel

    for entry in Case(path).expected.values():
        with torch.device("meta"):
            unet = UNet2DConditionModel(**entry["config"])
        assert sum(p.numel() for p in unet.parameters()) == entry["total_parameters"]
        for key, want in entry["sets"].items():
            script, option = key.split(":")
            names = published_names(unet, script, option)
            assert size(unet, names) == (want["tensors"], want["weights"]), key
            digest = hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()
            assert digest == want["sha256_of_sorted_names_joined_by_newline"], key
            assert names == want.get("names", names), key
        assert select(unet, "xattn-strict") == select(unet, "esd-x-strict") != select(unet, "esd-x")


@pytest.mark.parametrize("path", cases("ca-"))
@pytest.mark.parametrize("detached", [True, False])
def test_ablating_concepts(path: Path, detached: bool) -> None:
    """Loss, prediction and gradients; with gradients through token 0 only these are others."""
    case = Case(path)
    unet = case.unet()
    eps, names = eps_of(unet), select(unet, "cross-attn")
    assert names == case.hyper["trained_names"]
    for name, run in case.hyper["runs"].items():
        n, want = run["ablation_samples"], case.expected[name]
        x, t, noise, mask, states = (
            case.input(f"{name}.{i}") for i in ("x_t", "timesteps", "noise", "mask", "emb_target")
        )
        anchor = case.input(f"{name}.emb_anchor")
        goal = {"anchor_states": anchor} if case.hyper["loss_type"] == "model-based" else {"noise": noise[:n]}
        with ablation.first_token_detached(unet) if detached else nullcontext():
            mean, summed = (
                ablation.losses(eps, x[:n], t[:n], states[:n], mask=mask[:n], reduction=r, **goal)  # type: ignore[arg-type]
                for r in ("channel_mean", "channel_sum")
            )
            assert float(summed.mean().detach()) == pytest.approx(want["ablation_term"], rel=1e-5)
            assert float(mean.mean().detach()) == pytest.approx(want["ablation_term_channel_mean"], rel=1e-5)
            loss = summed.mean()
            if len(x) > n:
                prior = ablation.denoising_losses(eps, x[n:], t[n:], states[n:], noise[n:]).mean()
                assert float(prior.detach()) == pytest.approx(want["prior_term"], rel=1e-5)
                loss = loss + case.hyper["prior_loss_weight"] * prior
            assert float(loss.detach()) == pytest.approx(want["loss"], rel=1e-5)
            with torch.no_grad():
                prediction = case.tensors[f"expected.{name}.prediction"]
                case.close(eps(x, t, states)[: len(prediction)], f"{name}.prediction", 5e-5)
                case.close(eps(x[:n], t[:n], anchor) if "anchor_states" in goal else noise[:n], f"{name}.target", 5e-5)
            found, golden = gradients(unet, loss, names), case.group(f"{name}.grad")
        assert set(golden) == set(names)
        with nullcontext() if detached else pytest.raises(AssertionError):
            agree(found, golden)
    case.finish()


@pytest.mark.parametrize("path", cases("fmn-token-positions"))
def test_token_positions(path: Path) -> None:
    case = Case(path)
    assert case.expected
    for name, want in case.expected.items():
        end = want["end_of_text"] if want["use_pooler"] else None
        stored = f"expected.{name.replace('+', '.')}"
        for row, variant in enumerate(("as_published", "as_intended")):
            found = forget_me_not.token_positions(
                want["prompt_ids"], want["concept_ids"], end, published=variant == "as_published"
            ).long()
            assert found.tolist() == want[variant] == case.tensors[stored][row].tolist(), (name, variant)
        case.checked.add(stored)
    case.finish()
    assert any(want["as_published"] != want["as_intended"] for want in case.expected.values())


@pytest.mark.parametrize("path", cases("fmn-attention-loss"))
def test_attention_loss(path: Path) -> None:
    case = Case(path)
    differ = 0
    for name, want in case.expected.items():
        if "closed_form" in want:
            heads, pixels, columns, tokens = (want[k] for k in ("heads", "pixels", "columns", "length"))
            positions = torch.arange(tokens)[None] < columns
            probs = [torch.full((heads, pixels, tokens), 1 / tokens)] * want["layers"]
            got = float(forget_me_not.joint_loss(probs, positions))
            assert got == pytest.approx(want["closed_form"], rel=1e-6)
            assert got == pytest.approx(want["as_published"], rel=1e-6)
            assert uniform_norm(want["layers"] * heads * pixels, columns, tokens) == pytest.approx(want["closed_form"])
            continue
        layers = [case.input(f"{name}.probs{j}") for j in range(len(want["heads"]))]
        positions = case.input(f"{name}.positions")
        for variant in ("as_published", "as_intended"):
            published = variant == "as_published"
            got = float(forget_me_not.joint_loss(layers, positions, published=published))
            assert got == pytest.approx(want[variant], rel=1e-6), (name, variant)
            each = forget_me_not.losses(layers, positions, published=published)
            assert each.shape == (want["batch"],)
            assert float(each.square().sum().sqrt()) == pytest.approx(want[variant], rel=1e-6)
        differ += want["as_published"] != pytest.approx(want["as_intended"], rel=1e-3)
    assert differ, "no case tells the published order of positions from the intended one"


@pytest.mark.parametrize("path", cases("fmn-inversion-norm"))
def test_inversion_norm(path: Path) -> None:
    case = Case(path)
    for name, want in case.expected.items():
        table, rows = case.input(f"{name}.rows"), want["updated_rows"]
        assert min(1.0, 100 * want["lr"]) == pytest.approx(want["pull"])
        got = table.clone()
        got[rows] = forget_me_not.pulled(table[rows], want["lr"], case.hyper["target_norm"])
        case.close(got, f"{name}.rows", 1e-6)
        assert not torch.equal(got, table)
    case.finish()


@pytest.mark.parametrize("path", cases("fmn-unet"))
def test_attention_of_a_unet(path: Path) -> None:
    case = Case(path)
    unet = case.unet()
    x, states, positions = (case.input(n) for n in ("x_t", "emb", "positions"))
    t = torch.tensor([case.hyper["timestep"]])
    with cross_attention_maps(unet) as maps:
        eps_of(unet)(x, t, states)
    loss = forget_me_not.losses([m.probs for m in maps], positions).sum()
    assert float(loss.detach()) == pytest.approx(case.expected["loss"], rel=1e-5)
    norms = {m.name: float(forget_me_not.losses([m.probs.detach()], positions)) for m in maps}
    assert norms == pytest.approx(case.expected["norm_per_layer"], rel=1e-5)
    names = select(unet, "cross-attn-all")
    found = gradients(unet, loss, names)
    without = case.expected["attn2_parameters_without_gradient"]
    assert [n for n in names if found[n] is None] == without
    want = case.group("grad")
    assert set(want) == set(names) - set(without)
    agree(found, want)
    shifted = positions.roll(1, 1)
    assert float(forget_me_not.losses([m.probs.detach() for m in maps], shifted)) != pytest.approx(
        case.expected["loss"], rel=1e-3
    )
    with pytest.raises(RequestError, match="does not occur"):
        forget_me_not.losses([m.probs for m in maps], torch.zeros_like(positions))
    case.finish()


@pytest.mark.parametrize("path", cases("srsme-repo-baselines"))
def test_srsme_versions(path: Path) -> None:
    case = Case(path)
    unet = case.unet()
    eps, names = eps_of(unet), select(unet, "cross-attn-all")
    concept, anchor = case.input("emb_concept"), case.input("emb_anchor")
    for name, run in case.hyper["runs"].items():
        x, t, want = case.input(f"{name}.x_t"), torch.tensor([run["timestep"]]), case.expected[name]
        if name == "fmn":
            with cross_attention_maps(unet) as maps:
                eps(x, t, concept)
            loss = forget_me_not.srsme_losses(maps, anchor)
        else:
            loss = ablation.srsme_losses(eps, eps, x, t, concept, anchor)
            assert want["anchor_term_times_10"] == 0
        assert loss.shape == (1,)
        assert float(loss.detach()) == pytest.approx(want["loss"], rel=1e-5)
        found, golden = gradients(unet, loss.sum(), names), case.group(f"{name}.grad")
        without = want.get("parameters_without_gradient", [])
        assert [n for n in names if found[n] is None] == without
        assert set(golden) == set(names) - set(without)
        agree(found, golden)
        with pytest.raises(AssertionError):
            agree({n: None if g is None else g * 1.01 for n, g in found.items()}, golden)
    case.finish()
