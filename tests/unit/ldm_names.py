"""A diffusers pipeline under the names of the original checkpoints, for tests of single files."""

import re

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
TOP = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def unet_name(name, layers, attention_up):
    """One name; ``attention_up`` holds the numbers of up blocks with attention."""
    for new, old in TOP.items():
        if name.startswith(f"{new}."):
            return name.replace(new, old)
    hit = re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)", name)
    if hit:
        way, block, part, number, rest = hit[1], int(hit[2]), hit[3], int(hit[4]), hit[5]
        if way == "down":
            index = 1 + block * (layers + 1) + (layers if part == "downsamplers" else number)
            stem = f"input_blocks.{index}"
            if part == "downsamplers":
                return f"{stem}.0.op.{rest.removeprefix('conv.')}"
        else:
            index = block * (layers + 1) + (layers if part == "upsamplers" else number)
            stem = f"output_blocks.{index}"
            if part == "upsamplers":
                return f"{stem}.{2 if block in attention_up else 1}.{rest}"
        return f"{stem}.1.{rest}" if part == "attentions" else f"{stem}.0.{_resnet(rest)}"
    hit = re.match(r"mid_block\.(resnets|attentions)\.(\d+)\.(.*)", name)
    if hit[1] == "attentions":
        return f"middle_block.1.{hit[3]}"
    return f"middle_block.{2 * int(hit[2])}.{_resnet(hit[3])}"


def _resnet(rest):
    part, _, end = rest.partition(".")
    return f"{RESNET[part]}.{end}"


def vae_name(name, blocks):
    """One name of an autoencoder with so many blocks."""
    name = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{blocks - 1 - int(m[1])}.block", name)
    return re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{blocks - 1 - int(m[1])}.upsample", name)


def checkpoint(parts):
    """All tensors of a pipeline of the first kind under their original names."""
    layers = parts.unet.config.layers_per_block
    up = [i for i, kind in enumerate(parts.unet.config.up_block_types) if "CrossAttn" in kind]
    blocks = len(parts.vae.config.block_out_channels)
    text = {f"cond_stage_model.transformer.text_model.{n}": t for n, t in parts.text_encoder.state_dict().items()}
    unet = {f"model.diffusion_model.{unet_name(n, layers, up)}": t for n, t in parts.unet.state_dict().items()}
    vae = {f"first_stage_model.{vae_name(n, blocks)}": t for n, t in parts.vae.state_dict().items()}
    return {**unet, **vae, **text}
