"""A functional U-Net in PyTorch on alphabar's weights: the oracle for values and gradients. NCHW inside, NHWC at the door."""

import math

import torch
import torch.nn.functional as F


def conv(x, w, name, stride=1, pad=None):
    weight = w[f"{name}.weight"].permute(3, 2, 0, 1).contiguous()  # HWIO to OIHW
    before, after = (weight.shape[-1] // 2,) * 2 if pad is None else pad
    return F.conv2d(F.pad(x, (before, after, before, after)), weight, w[f"{name}.bias"], stride)


def linear(x, w, name):
    return x @ w[f"{name}.weight"] + w[f"{name}.bias"]


def norm(x, w, name, groups, eps):
    return F.group_norm(x, groups, w[f"{name}.weight"], w[f"{name}.bias"], eps)


def attention(x, w, name, c, groups):
    n = norm(x, w, f"{name}.group_norm", groups, c["norm_eps"]) if groups else x
    batch, width, height, length = x.shape
    heads = 1 if c["head_dim"] is None else width // c["head_dim"]
    q, k, v = (conv(n, w, f"{name}.to_{z}").reshape(batch, heads, width // heads, -1).transpose(2, 3) for z in "qkv")
    s = q @ k.transpose(2, 3) / math.sqrt(width // heads)
    o = (torch.softmax(s, -1) @ v).transpose(2, 3).reshape(batch, width, height, length)
    return x + conv(o, w, f"{name}.to_out.0")


def features(t, c, dtype):
    half = c["channels"][0] // 2
    omega = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float64) / (half - c["freq_shift"]))
    angle = (t.double() - c["time_origin"])[:, None] * omega
    pair = [torch.sin(angle), torch.cos(angle)]
    return torch.cat(pair[::-1] if c["flip_sin_to_cos"] else pair, 1).to(dtype)


def unet(c, w, x, t, y=None):
    """c: UNet.config (attention as one bool for each level); w: name -> tensor in alphabar's layout; x (B, H, W, C)."""
    levels, groups, eps = range(len(c["channels"])), c["groups"], c["norm_eps"]
    emb = linear(F.silu(linear(features(t, c, x.dtype), w, "time_embedding.linear_1")), w, "time_embedding.linear_2")
    if y is not None:
        emb = emb + w["class_embedding.weight"][y]
    columns = iter(linear(F.silu(emb), w, "time_emb_proj").split(1, dim=1))

    def block(x, name):
        h = conv(F.silu(norm(x, w, f"{name}.norm1", groups, eps)), w, f"{name}.conv1")
        width = h.shape[1]
        take = torch.cat([next(columns) for _ in range(2 * width if c["scale_shift"] else width)], 1)[:, :, None, None]
        if c["scale_shift"]:
            h = norm(h, w, f"{name}.norm2", groups, eps) * (1 + take[:, :width]) + take[:, width:]
        else:
            h = norm(h + take, w, f"{name}.norm2", groups, eps)
        h = conv(F.silu(h), w, f"{name}.conv2")
        return h + (conv(x, w, f"{name}.conv_shortcut") if f"{name}.conv_shortcut.weight" in w else x)

    def level(h, name, j, attend):
        h = block(h, f"{name}.resnets.{j}")
        return attention(h, w, f"{name}.attentions.{j}", c, groups) if attend else h

    h = conv(x.permute(0, 3, 1, 2), w, "conv_in")
    skips = [h]
    for i in levels:
        for j in range(c["blocks"]):
            h = level(h, f"down_blocks.{i}", j, c["attention"][i])
            skips.append(h)
        if i < levels[-1]:
            h = conv(h, w, f"down_blocks.{i}.downsamplers.0.conv", 2, c["downsample_pad"])
            skips.append(h)
    if c["middle"] != "none":
        h = block(h, "mid_block.resnets.0")
        if c["middle"] == "attention":
            h = attention(h, w, "mid_block.attentions.0", c, groups if c["middle_groups"] is None else c["middle_groups"])
        h = block(h, "mid_block.resnets.1")
    up = c["attention"] if c["attention_up"] is None else c["attention_up"]
    for i in levels:
        for j in range(c["blocks"] + 1):
            h = level(torch.cat([h, skips.pop()], 1), f"up_blocks.{i}", j, up[levels[-1] - i])
        if i < levels[-1]:
            h = conv(F.interpolate(h, scale_factor=2, mode="nearest"), w, f"up_blocks.{i}.upsamplers.0.conv")
    h = conv(F.silu(norm(h, w, "conv_norm_out", groups, eps)), w, "conv_out")
    return h.permute(0, 2, 3, 1)
