"""What diffusers' pipelines really read of their text encoders, tensor by tensor."""

import json

import pytest
import torch

from expunge.consumers.diffusion_text import text_reads
from expunge.consumers.reads import influences
from expunge.consumers.tiny import tiny_text_encoder


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    table = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    table.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(vocab_size=60, min_frequency=1, end_of_word_suffix="</w>", show_progress=False)
    table.train_from_iterator(["a red cat"], trainer)
    found = json.loads(table.to_str())["model"]
    vocab = found["vocab"] | {"<|startoftext|>": 62, "<|endoftext|>": 63}
    return CLIPTokenizer(vocab=vocab, merges=[tuple(m) for m in found["merges"]], model_max_length=12)


@pytest.mark.slow
def test_pipelines_read_what_we_say():
    pytest.importorskip("diffusers")
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
    from transformers import CLIPTextModelWithProjection

    first, second, words = (
        tiny_text_encoder(0),
        CLIPTextModelWithProjection(tiny_text_encoder(0).config).eval(),
        tokenizer(),
    )
    rest = dict.fromkeys(("vae", "unet", "scheduler", "feature_extractor"))
    sd = StableDiffusionPipeline(
        text_encoder=first, tokenizer=words, safety_checker=None, requires_safety_checker=False, **rest
    )
    pair = {"text_encoder_2": second, "tokenizer_2": words, "image_encoder": None, "add_watermarker": False}
    xl = StableDiffusionXLPipeline(text_encoder=first, tokenizer=words, **pair, **rest)

    def read_by_sd():
        return sd.encode_prompt("a red cat", torch.device("cpu"), 1, False)[0]

    def read_by_xl():
        prompt, _, pooled, _ = xl.encode_prompt("a red cat", device="cpu", do_classifier_free_guidance=False)
        return torch.cat([prompt.flatten(), pooled.flatten()])

    checked = {True: 0, False: 0}
    for call, pipeline, name, encoder in (
        (read_by_sd, "StableDiffusionPipeline", "text_encoder", first),
        (read_by_xl, "StableDiffusionXLPipeline", "text_encoder", first),
        (read_by_xl, "StableDiffusionXLPipeline", "text_encoder_2", second),
    ):
        reads = text_reads(2, pipeline=pipeline, encoder=name)
        for tensor, parameter in encoder.named_parameters():
            if tensor.endswith(".weight"):
                assert influences(call, parameter) == reads.uses(tensor), (pipeline, name, tensor)
                checked[reads.uses(tensor)] += 1
    assert checked[True] > 20
    assert checked[False] > 5
