"""Make tests/golden/<family>/: tiny random checkpoints, and what transformers computes with them.

Not run by the tests. Needs an environment of its own, with torch, which mlxpref itself never needs:

    python3.11 -m venv venv-torch
    venv-torch/bin/pip install torch==2.13.0 'transformers==5.24.*' peft==0.21.2
    venv-torch/bin/pip install numpy pillow safetensors tokenizers click
    venv-torch/bin/python scripts/make_golden.py --family qwen3_5 --family qwen3_vl_moe
    venv-torch/bin/python scripts/make_golden.py --only-gradient  # leaves checkpoints and golden.npz as they are

transformers 5.23 made qwen2_vl, qwen2_5_vl and qwen3_vl, and 5.24 makes them again byte for byte; 5.24 made qwen3_5
and qwen3_vl_moe.

A folder is a checkpoint in the hub's own layout (bfloat16) with golden.npz beside it, computed in float32 for
one comparison of two images of different sizes: image0, image1 [H, W, 3] uint8; text (the rendered chat, one
placeholder an image); input_ids [L]; image_grid_thw [2, 3]; pixel_values [patches, values]; vision [image
tokens, hidden] and, where there are levels, deepstack [levels, image tokens, hidden]; position_ids [3, L];
rope_delta []; logits [L, vocabulary]; greedy_ids [24], the continuation without sampling and without penalties.

The weights' seed is the first whose greedy continuation has no near tie and no added token, so that other
software, which rounds otherwise, must write the same one; nor may the choice of any position's experts be a
near tie, in golden.npz or gradient.npz. Sizes are small, for the folders stay in the repository. Kept from the
real models: grouped queries, sections of the rotary embedding, windows that do not divide the image, two deepstack
levels, interpolated positions, tied and untied and sharded weights; Qwen3.5's gated delta layers before one of
attention, norms around zero and a rotary embedding of a quarter of a head; experts in the hub's orientation. None of
their matrices is square: transformers turns one around only if its shape tells that it has to, so 2 I is not 64.

gradient.npz, beside it, is one update in float32 by PEFT's LoRA and torch's autograd through R full sequences, the
comparison of golden.npz and a completion of T tokens at most. Given: tokens [R, T] padded with 0, lengths [R];
old and reference log-probabilities, weights [R, T]; advantages, y, answer_weights [R]; label_ids [2, variants];
silent [ids], which get no probability; temperature, clip_low, clip_high, kl, format_weight, rank, scale []; and
`weight:` + the name of a matrix in MLX, a [inputs, rank] or b [rank, outputs]. Found: loss []; clipped [], how many
tokens lost their gradient; logprobs [R, T]; and `gradient:` + the name, the derivative of the loss.
"""

import itertools
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import transformers
from huggingface_hub import save_torch_state_dict
from peft import LoraConfig, get_peft_model
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

Array = np.ndarray[Any, Any]
Json = dict[str, Any]

GOLDEN = Path(__file__).parent.parent / "tests" / "golden"
GREEDY_TOKENS = 24
MARGIN = 0.1
"""The least distance in logits of the best token from the second best, at every greedy step."""
ROUTER_MARGIN = 1e-3
"""The least distance of the last chosen expert's probability from the next one's, as a share of the former."""
EXPERTS, CHOSEN, ASKED = 8, 2, 6
"""Experts of a layer, those of a token, and how many the tokens of a comparison ask at least."""

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "qwen3_vl_moe")
QWEN3 = FAMILIES[2:]
PREFIXES = dict(zip(FAMILIES, ("Qwen2VL", "Qwen2_5_VL", "Qwen3VL", "Qwen3_5", "Qwen3VLMoe"), strict=True))
TIED = {"qwen2_vl": False, "qwen2_5_vl": True, "qwen3_vl": True, "qwen3_5": True, "qwen3_vl_moe": False}
SHARD_BYTES = {"qwen2_vl": 150_000, "qwen3_5": 200_000}
"""Of the families with more than one file of weights."""
VOCABULARY = 352
"""Rows of the embedding: more than the tokenizer has tokens, as in the real models."""

IMAGE = {"type": "image"}
WORDS = ("Prompt: a red kite\nImage 1:", "\nImage 2:", "\nFirst <think>, then answer 1 or 2.")
FIRST, SECOND, QUESTION = ({"type": "text", "text": words} for words in WORDS)
MESSAGES = [
    {"role": "system", "content": "You compare images."},
    {"role": "user", "content": [FIRST, IMAGE, SECOND, IMAGE, QUESTION]},
]
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}"
    "{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ANSWER = "assistant\n<think>The image is sharper.</think><answer>1</answer>"
CORPUS = ["system\nYou compare images.", "user\n" + " ".join(WORDS), ANSWER]
MERGED_TOKENS = 328
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NAMES = "endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start quad_end"
NAMES += " vision_start vision_end vision_pad image_pad video_pad"
SPECIAL = [f"<|{name}|>" for name in NAMES.split()]
NOT_SPECIAL = {"qwen2_vl": [], "qwen2_5_vl": ["<tool_call>", "</tool_call>"]}
NOT_SPECIAL |= {family: [*NOT_SPECIAL["qwen2_5_vl"], "<think>", "</think>"] for family in QWEN3}

RANK, ALPHA = 2, 3.0
LENGTHS = (5, 2, 7)
ANSWERED = (True, False, True)
ADVANTAGES = (0.9, -0.7, -0.4)
RATIOS = (0.6, 0.76, 1.1, 1.24, 1.6)
"""The policy's probability of a token over the old one: on both sides of each bound, and not near any."""
STEP = {"temperature": 0.8, "clip_low": 0.2, "clip_high": 0.28, "kl": 0.1, "format_weight": 0.2}
HUMAN_SHARE = 0.8


def make_tokenizer(family: str) -> Tokenizer:
    """A byte-level tokenizer trained on the few sentences above, with the family's added tokens after it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=MERGED_TOKENS, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in NOT_SPECIAL[family]])
    return tokenizer


def tokenizer_config(tokenizer: Tokenizer) -> Json:
    flags = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    added = {
        str(number): {flag: getattr(token, flag) for flag in flags}
        for number, token in sorted(tokenizer.get_added_tokens_decoder().items())
    }
    config: Json = {"tokenizer_class": "Qwen2Tokenizer", "model_max_length": 131072, "errors": "replace"}
    config |= {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None}
    config |= {"clean_up_tokenization_spaces": False, "split_special_tokens": False}
    config |= {"additional_special_tokens": SPECIAL[1:], "added_tokens_decoder": added}
    return config | {"chat_template": CHAT_TEMPLATE}


def text_config(family: str, tokenizer: Tokenizer) -> Json:
    number = tokenizer.token_to_id
    text: Json = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "use_cache": True}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_act": "silu", "rms_norm_eps": 1e-06}
    text |= {
        "bos_token_id": number("<|endoftext|>"),
        "eos_token_id": number("<|im_end|>"),
        "vocab_size": VOCABULARY,
    }
    text |= {"attention_dropout": 0.0, "initializer_range": 0.02, "tie_word_embeddings": TIED[family]}
    if family in QWEN3:
        text |= {"attention_bias": False, "dtype": "bfloat16", "head_dim": 16, "model_type": f"{family}_text"}
        text |= {"max_position_embeddings": 262144}
        scaling = {"mrope_interleaved": True, "mrope_section": [4, 2, 2], "rope_type": "default"}
        if family == "qwen3_5":
            return hybrid_config(text, scaling)
        text |= {"rope_theta": 5000000, "rope_scaling": scaling}
        if family == "qwen3_vl_moe":
            text |= {"num_experts": EXPERTS, "num_experts_per_tok": CHOSEN, "moe_intermediate_size": 16}
            text |= {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}
        return text
    text |= {"max_position_embeddings": 32768, "rope_theta": 1000000.0, "torch_dtype": "bfloat16"}
    text |= {"max_window_layers": 2, "sliding_window": 32768, "use_sliding_window": False}
    return text | {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}


def hybrid_config(text: Json, scaling: Json) -> Json:
    """The settings of Qwen3.5: layers of two kinds, and a rotary embedding of 8 of the 32 numbers of a head."""
    text |= {"head_dim": 32, "attn_output_gate": True, "num_hidden_layers": 3, "full_attention_interval": 3}
    text |= {"layer_types": ["linear_attention", "linear_attention", "full_attention"]}
    text |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_conv_kernel_dim": 4}
    text |= {"linear_key_head_dim": 16, "linear_value_head_dim": 16, "eos_token_id": text.pop("bos_token_id")}
    scaling |= {"mrope_section": [2, 1, 1], "rope_theta": 10000000, "partial_rotary_factor": 0.25}
    return text | {"rope_parameters": scaling}


def vision_config(family: str) -> Json:
    vision: Json = {"num_heads": 2, "spatial_merge_size": 2, "temporal_patch_size": 2}
    if family == "qwen2_vl":
        vision |= {"depth": 2, "embed_dim": 16, "hidden_size": 64, "mlp_ratio": 4}
        return vision | {"in_chans": 3, "patch_size": 14, "spatial_patch_size": 14}
    vision |= {"hidden_size": 16, "intermediate_size": 40, "out_hidden_size": 64, "model_type": family}
    if family == "qwen2_5_vl":
        vision |= {"depth": 4, "window_size": 56, "fullatt_block_indexes": [1, 3], "tokens_per_second": 2}
        return vision | {"in_chans": 3, "patch_size": 14, "spatial_patch_size": 14, "hidden_act": "silu"}
    levels = [] if family == "qwen3_5" else [0, 1]
    vision |= {"depth": 3, "deepstack_visual_indexes": levels, "num_position_embeddings": 64}
    return vision | {"in_channels": 3, "patch_size": 16, "hidden_act": "gelu_pytorch_tanh"}


def model_config(family: str, tokenizer: Tokenizer) -> Json:
    """config.json as the hub has it: flat for Qwen2-VL and Qwen2.5-VL, nested for the later ones."""
    config: Json = {"architectures": [f"{PREFIXES[family]}ForConditionalGeneration"], "model_type": family}
    names = {"image": "image_pad", "video": "video_pad", "vision": "vision_pad"}
    names |= {"vision_start": "vision_start", "vision_end": "vision_end"}
    config |= {f"{key}_token_id": tokenizer.token_to_id(f"<|{name}|>") for key, name in names.items()}
    text, vision = text_config(family, tokenizer), vision_config(family)
    if family in QWEN3:
        del config["vision_token_id"]
        config |= {"tie_word_embeddings": TIED[family], "transformers_version": "4.57.0.dev0"}
        return config | {"text_config": text, "vision_config": vision}
    return config | text | {"transformers_version": "4.41.2", "vision_config": vision}


def preprocessor_config(family: str) -> Json:
    prefix = PREFIXES["qwen3_vl" if family in QWEN3 else family]
    config: Json = {"processor_class": f"{prefix}Processor", "merge_size": 2}
    config["temporal_patch_size"] = 2
    if family in QWEN3:
        config |= {"patch_size": 16, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        size = {"longest_edge": 16777216, "shortest_edge": 4096}  # the hub's least size is 256 x 256
        return config | {"image_processor_type": "Qwen2VLImageProcessorFast", "size": size}
    config |= {"patch_size": 14, "min_pixels": 3136, "max_pixels": 12845056}
    config |= {"image_mean": [0.48145466, 0.4578275, 0.40821073]}
    config |= {"image_std": [0.26862954, 0.26130258, 0.27577711]}
    return config | {"image_processor_type": "Qwen2VLImageProcessor"}


def generation_config(family: str, tokenizer: Tokenizer) -> Json:
    """As on the hub: settings that change what is written if a caller leaves them open."""
    end, pad = (tokenizer.token_to_id(token) for token in ("<|im_end|>", "<|endoftext|>"))
    ids = {"bos_token_id": pad, "pad_token_id": pad, "do_sample": True, "eos_token_id": [end, pad]}
    if family in QWEN3:
        return ids | {"top_k": 20, "top_p": 0.8, "temperature": 0.7}
    return ids | {"repetition_penalty": 1.05, "temperature": 1e-06}


def write_settings(folder: Path, family: str, tokenizer: Tokenizer) -> None:
    """Everything of the checkpoint but its weights."""
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    files = {
        "config.json": model_config(family, tokenizer),
        "tokenizer_config.json": tokenizer_config(tokenizer),
        "chat_template.json": {"chat_template": CHAT_TEMPLATE},
        "preprocessor_config.json": preprocessor_config(family),
        "generation_config.json": generation_config(family, tokenizer),
    }
    if family in QWEN3:
        video = {"processor_class": "Qwen3VLProcessor", "video_processor_type": "Qwen3VLVideoProcessor"}
        settings = {k: v for k, v in preprocessor_config(family).items() if k != "image_processor_type"}
        files["video_preprocessor_config.json"] = settings | video
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=1 if name == "config.json" else None) + "\n")


def random_weights(folder: Path, family: str, seed: int) -> dict[str, torch.Tensor]:
    """bfloat16 weights under the hub's names, scaled so that logits have spread and depend on every part."""
    with torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(folder)
        model = transformers.AutoModelForImageTextToText.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, meta in sorted(model.state_dict().items()):
        if name == "lm_head.weight" and TIED[family]:
            continue
        tensor = scaled(name, torch.randn(meta.shape, generator=generator), family)
        if ".mlp.experts." in name:
            tensor = tensor.transpose(1, 2).contiguous()
        if family not in QWEN3:
            name = name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")
        weights[name] = tensor.bfloat16()
    return weights


def scaled(name: str, tensor: torch.Tensor, family: str) -> torch.Tensor:
    """A weight from standard normal numbers, by its name in transformers."""
    if name.endswith("A_log"):  # a state keeps 0.66 to 0.999 of itself from token to token, half of them over 0.95
        return tensor - 2.5
    if name.endswith("bias"):
        return (0.5 if name.endswith("dt_bias") else 0.1) * tensor
    if tensor.ndim == 1:
        tensor = (1 + 0.2 * tensor) * (1.6 if name.endswith(("q_norm.weight", "k_norm.weight")) else 1)
        around_zero = family == "qwen3_5" and "language_model" in name and "linear_attn" not in name
        return tensor - 1 if around_zero else tensor
    if name.endswith(("embed_tokens.weight", "lm_head.weight")):
        return 0.25 * tensor
    if name.endswith("pos_embed.weight"):
        return 0.5 * tensor
    gain = 1.6 if any(part in name for part in ("q_proj", "k_proj", "o_proj", "qkv")) else 1.2
    inputs = tensor.shape[-1] if ".mlp.experts." in name else tensor[0].numel()
    return gain / math.sqrt(inputs) * tensor


def picture(width: int, height: int, colour: tuple[int, int, int]) -> Array:
    """A disc on a stepped gradient: few colours, so that it compresses, and no two patches alike in place."""
    y, x = np.mgrid[:height, :width]
    image = np.stack([x // 12 * 20, y // 12 * 20, (x + y) // 24 * 20], axis=-1).astype(np.uint8)
    image[(x - width * 0.4) ** 2 + (y - height * 0.5) ** 2 < (min(width, height) * 0.35) ** 2] = colour
    return image


def load(folder: Path) -> tuple[Any, dict[str, list[torch.Tensor]]]:
    """A checkpoint in float32, and where its routers will leave the logits of experts, by their names."""
    auto = transformers.AutoModelForImageTextToText
    how = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = auto.from_pretrained(folder, dtype=torch.float32, **how).eval()
    routers = {name: router for name, router in model.named_modules() if name.endswith(".mlp.gate")}
    heard: dict[str, list[torch.Tensor]] = {name: [] for name in routers}
    for name, router in routers.items():
        router.register_forward_hook(lambda *call, name=name: heard[name].append(call[2][0].detach()))
    return model, heard


def router_margin(heard: dict[str, list[torch.Tensor]]) -> float:
    """The margin of the closest choice of experts; 0 if a layer never asks `ASKED` of them."""
    margin = math.inf
    for logits in heard.values():
        likely = torch.cat(logits).softmax(-1).topk(CHOSEN + 1)
        last, following = likely.values[:, -2:].unbind(-1)
        asked = len(likely.indices[:, :CHOSEN].unique())
        margin = min(margin, float((1 - following / last).min()) if asked >= ASKED else 0.0)
    return margin


def compute(folder: Path, family: str) -> tuple[dict[str, Array], float]:
    """What transformers makes of checkpoint and comparison, and the margin of the closest greedy step."""
    unit = 32 if family in QWEN3 else 28
    images = [picture(5 * unit, 3 * unit, (220, 40, 40)), picture(3 * unit, 4 * unit, (30, 60, 200))]
    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    features = dict(processor(images=[Image.fromarray(image) for image in images], return_tensors="pt"))
    pixels, grid = features["pixel_values"], features["image_grid_thw"]

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    pads = ["<|image_pad|>" * (int(size.prod()) // 4) for size in grid]
    expanded = text.replace("<|image_pad|>", "{}").format(*pads)
    ids = tokenizer(expanded, return_tensors="pt")["input_ids"]
    length = ids.shape[1]

    model, routers = load(folder)
    settings = {"do_sample": False, "repetition_penalty": 1.0, "eos_token_id": None, "pad_token_id": 0}
    model.generation_config = transformers.GenerationConfig(max_new_tokens=GREEDY_TOKENS, **settings)
    # An image placeholder would break what follows; a seed where this changes anything is refused below.
    model.generation_config.suppress_tokens = list(range(MERGED_TOKENS, VOCABULARY))
    kind = (ids == model.config.image_token_id).int()
    kinds = torch.nn.functional.pad(kind, (0, GREEDY_TOKENS))
    with torch.inference_mode():
        vision = model.get_image_features(pixels, grid)
        positions, delta = model.model.get_rope_index(ids, mm_token_type_ids=kind, image_grid_thw=grid)
        logits = model(input_ids=ids, mm_token_type_ids=kind, **features).logits[0]
        written = model.generate(ids, mm_token_type_ids=kind, attention_mask=torch.ones_like(ids), **features)
        again = model(input_ids=written, mm_token_type_ids=kinds, **features).logits[0, length - 1 : -1]
    written, best = written[0, length:], again.topk(2)
    margin = float((best.values[:, 0] - best.values[:, 1]).min())
    result = {"image0": images[0], "image1": images[1], "text": np.array(text), "input_ids": ids[0].numpy()}
    result |= {name: tensor.numpy() for name, tensor in features.items()}
    result["vision"] = torch.cat(vision.pooler_output).numpy()
    if hasattr(vision, "deepstack_features"):
        levels = [torch.cat(level) for level in vision.deepstack_features]
        result["deepstack"] = torch.stack(levels).numpy()
    result |= {"position_ids": positions[:, 0].numpy(), "rope_delta": delta[0, 0].numpy()}
    result |= {"logits": logits.numpy(), "greedy_ids": written.numpy()}
    clear = torch.equal(written, best.indices[:, 0]) and router_margin(routers) > ROUTER_MARGIN
    return result, margin if clear else 0.0


def adapted(model: Any, rng: np.random.Generator) -> tuple[Any, dict[str, torch.nn.Parameter]]:
    """A model with random adapters where mlxpref puts them, and the matrices' MLX names.

    That is on the linear layers of the language model, but for the small ones that make the decay and the strength
    of a gated delta layer's update. Routers and experts are no linear layers to transformers.
    """
    kinds = [(name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    targets = [name for name, _ in kinds if name.startswith("model.language_model.layers.")]
    targets = [name for name in targets if not name.endswith((".in_proj_a", ".in_proj_b"))]
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=targets))
    named = re.compile(r"base_model\.model\.model\.language_model\.(.+)\.lora_([AB])\.default\.weight")
    matrices = {}
    for name, matrix in model.named_parameters():
        if matrix.requires_grad:
            layer, kind = named.fullmatch(name).groups()  # type: ignore[union-attr]
            matrices[f"language_model.model.{layer}.lora_{kind.lower()}"] = matrix
            values = torch.from_numpy(rng.standard_normal(matrix.shape).astype(np.float32))
            matrix.data = values / math.sqrt(matrix.shape[1]) * (1.0 if kind == "A" else 0.5)
    assert len(matrices) == 2 * len(targets)
    return model, matrices


def said(model: Any, golden: dict[str, Array], completion: list[int], silent: list[int]) -> torch.Tensor:
    """Logits (T + 1, V) that say each token of a completion and what follows it, from the whole sequence at once."""
    ids = torch.tensor([[*golden["input_ids"].tolist(), *completion]])
    kinds = (ids == model.config.image_token_id).int()
    features = {name: torch.from_numpy(golden[name]) for name in ("pixel_values", "image_grid_thw")}
    logits = model(input_ids=ids, mm_token_type_ids=kinds, use_cache=False, **features).logits[0]
    possible = torch.zeros(logits.shape[-1])
    possible[silent] = -torch.inf
    return logits[-len(completion) - 1 :] + possible


def update_loss(given: dict[str, Any], logprobs: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """The loss of the update: the clipped surrogate and k3 of tokens (R, T), the `soft` reward of labels (R, 2)."""
    tensors = {name: torch.as_tensor(value) for name, value in given.items()}
    ratio, advantage = torch.exp(logprobs - tensors["old"]), tensors["advantages"][:, None]
    bounded = ratio.clamp(1 - STEP["clip_low"], 1 + STEP["clip_high"])
    surrogate = torch.minimum(ratio * advantage, bounded * advantage)
    behind = tensors["reference"] - logprobs
    divergence = behind.exp() - behind - 1
    (first, second), y = labels.unbind(-1), tensors["y"]
    reward = STEP["format_weight"] * (first + second) + first * y + second * (1 - y)
    loss = (tensors["weights"] * (STEP["kl"] * divergence - surrogate)).sum()
    loss = loss - (tensors["answer_weights"] * reward).sum()
    clipped = ((surrogate != ratio * advantage) & (tensors["weights"] > 0)).sum()
    return {"loss": loss, "clipped": clipped, "logprobs": logprobs}


def compute_gradient(folder: Path) -> dict[str, Array]:
    """What torch makes of one update of the checkpoint with an adapter."""
    rng = np.random.default_rng(0)
    with np.load(folder / "golden.npz", allow_pickle=False) as arrays:
        golden = dict(arrays)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model, routers = load(folder)
    model, matrices = adapted(model, rng)
    silent = {model.config.image_token_id, model.config.video_token_id, *range(len(tokenizer), VOCABULARY)}
    ordinary = sorted(set(range(len(tokenizer))) - set(tokenizer.added_tokens_decoder))
    mask = np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]
    tokens, chosen, ends = np.zeros(mask.shape, np.int32), [], []
    for row, length in enumerate(LENGTHS):
        completion = rng.choice(ordinary, length).tolist()
        tokens[row, :length] = completion
        logits = said(model, golden, completion, sorted(silent))
        saying = (logits[:-1] / STEP["temperature"]).log_softmax(-1)[torch.arange(length), completion]
        chosen.append(torch.nn.functional.pad(saying, (0, max(LENGTHS) - length)))
        ends.append(logits[-1].softmax(-1))
    if router_margin(routers) < ROUTER_MARGIN:
        raise click.ClickException(f"{folder}: a router's choice is a near tie in the update; take another seed")
    logprobs, answers = torch.stack(chosen), torch.stack(ends)
    # The tiny tokenizer has but one way to write a digit; a likely token stands in for another one.
    likely = answers.detach().mean(0)[ordinary].topk(2).indices
    labels = [
        [tokenizer.convert_tokens_to_ids(digit), ordinary[place]] for digit, place in zip("12", likely, strict=True)
    ]

    policy, positions = logprobs.detach().numpy(), sum(LENGTHS) + sum(ANSWERED)
    given = {
        "old": mask * (policy - np.log(np.resize(RATIOS, mask.shape))),
        "reference": mask * (policy + 0.5 * rng.standard_normal(mask.shape)),
        "weights": mask / positions,
        "answer_weights": np.array(ANSWERED) / positions,
        "advantages": np.array(ADVANTAGES),
        "y": np.full(len(LENGTHS), HUMAN_SHARE),
    }
    given = {name: value.astype(np.float32) for name, value in given.items()}
    found = update_loss(given, logprobs, torch.stack([answers[:, ids].sum(-1) for ids in labels], -1))
    found["loss"].backward()
    result = given | {name: tensor.detach().numpy() for name, tensor in found.items()}
    result |= {"tokens": tokens, "lengths": np.array(LENGTHS), "label_ids": np.array(labels)}
    result |= {"silent": np.array(sorted(silent)), "rank": np.array(RANK), "scale": np.array(ALPHA / RANK)}
    result |= {name: np.array(value) for name, value in STEP.items()}
    result |= {f"weight:{name}": matrix.detach().numpy().T for name, matrix in matrices.items()}
    return result | {f"gradient:{name}": matrix.grad.numpy().T for name, matrix in matrices.items()}


@click.command(help="Make the golden checkpoints and numbers; needs torch and transformers (see this file).")
@click.option("--output", type=click.Path(path_type=Path), default=GOLDEN, show_default="tests/golden")
@click.option("--family", "families", type=click.Choice(FAMILIES), multiple=True, help="Only this; may be repeated.")
@click.option("--only-gradient", is_flag=True, help="Make gradient.npz from the checkpoints that are there.")
def main(output: Path, families: tuple[str, ...], only_gradient: bool) -> None:
    torch.set_num_threads(1)
    for family in families or FAMILIES:
        folder = output / family
        if not only_gradient:
            make_checkpoint(folder, family)
        gradient = compute_gradient(folder)
        np.savez_compressed(folder / "gradient.npz", allow_pickle=False, **gradient)
        size, clipped = (folder / "gradient.npz").stat().st_size, gradient["clipped"]
        click.echo(f"{family}: loss {gradient['loss']:.4f}, {clipped} of {sum(LENGTHS)} tokens clipped, {size} bytes")


def make_checkpoint(folder: Path, family: str) -> None:
    """The checkpoint of a family, and golden.npz beside it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_settings(folder, family, make_tokenizer(family))
    for seed in itertools.count():
        weights = random_weights(folder, family, seed)
        save_torch_state_dict(weights, folder, max_shard_size=SHARD_BYTES.get(family, 500_000))
        golden, margin = compute(folder, family)
        if margin > MARGIN and len(set(golden["greedy_ids"].tolist())) >= GREEDY_TOKENS // 3:
            break
    np.savez_compressed(folder / "golden.npz", allow_pickle=False, **golden)
    size = sum(file.stat().st_size for file in folder.iterdir())
    length = len(golden["input_ids"])
    click.echo(f"{family}: seed {seed}, greedy margin {margin:.3f}, {length} positions, {size} bytes")


if __name__ == "__main__":
    main()
