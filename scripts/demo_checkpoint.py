"""The demo judge's checkpoint: its tokenizer, its configuration and its weights in the Hugging Face layout."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx_vlm
from mlx.utils import tree_flatten
from mlx_vlm.models.qwen2_5_vl import Model, ModelConfig, TextConfig, VisionConfig
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

__all__ = ["build_model", "check_checkpoint", "checkpoint_files", "train_tokenizer", "write_checkpoint"]

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
"""Added tokens that are not special, as Qwen3's <think> is: one token each, whatever stands beside them."""
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen's own tokenizers split text before the merges; every digit is its own token."""
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' or 'image' in part or 'image_url' in part %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MAX_PIXELS = 84 * 84
PATCH = 14
MERGE = 2
TEXT: dict[str, int] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
VISION: dict[str, int] = {"depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2}
MROPE_SECTION = (4, 6, 6)
"""How many of a head's 16 rotation frequencies turn with time, height and width."""


def train_tokenizer(corpus: Iterable[str]) -> Tokenizer:
    """A byte-level BPE tokenizer in which every word of the corpus is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    # Merging ends by itself once every word of the corpus is a token, far below this size.
    trainer = trainers.BpeTrainer(
        vocab_size=4096, min_frequency=1, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    return tokenizer


def checkpoint_files(tokenizer: Tokenizer) -> dict[str, Any]:
    """Every file of the checkpoint but the tokenizer and the weights, by name."""
    return {
        "config.json": _config(tokenizer),
        "generation_config.json": {
            "eos_token_id": [tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")],
            "pad_token_id": tokenizer.token_to_id("<|endoftext|>"),
        },
        "preprocessor_config.json": {
            "min_pixels": (PATCH * MERGE) ** 2,
            "max_pixels": MAX_PIXELS,
            "patch_size": PATCH,
            "temporal_patch_size": 2,
            "merge_size": MERGE,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2_5_VLProcessor",
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "bos_token": None,
            "unk_token": None,
            "add_bos_token": False,
            "model_max_length": 8192,
            "clean_up_tokenization_spaces": False,
            "additional_special_tokens": list(SPECIAL),
            "chat_template": CHAT_TEMPLATE,
        },
        "chat_template.json": {"chat_template": CHAT_TEMPLATE},
    }


def _config(tokenizer: Tokenizer) -> dict[str, Any]:
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "vocab_size": (size + 31) // 32 * 32,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 8192,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "use_cache": True,
        "use_sliding_window": False,
        "rope_scaling": {"type": "mrope", "mrope_section": list(MROPE_SECTION)},
        "bos_token_id": tokenizer.token_to_id("<|endoftext|>"),
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
        "pad_token_id": tokenizer.token_to_id("<|endoftext|>"),
        "image_token_id": tokenizer.token_to_id("<|image_pad|>"),
        "video_token_id": tokenizer.token_to_id("<|video_pad|>"),
        "vision_start_token_id": tokenizer.token_to_id("<|vision_start|>"),
        "vision_end_token_id": tokenizer.token_to_id("<|vision_end|>"),
        "vision_token_id": tokenizer.token_to_id("<|vision_pad|>"),
        **TEXT,
        "vision_config": {
            "model_type": "qwen2_5_vl",
            "hidden_act": "silu",
            "in_chans": 3,
            "in_channels": 3,
            "patch_size": PATCH,
            "spatial_patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 2,
            "tokens_per_second": 2,
            "window_size": 112,
            # Every block attends to the whole image, so windows play no part whatever an image's shape.
            "fullatt_block_indexes": list(range(VISION["depth"])),
            "out_hidden_size": TEXT["hidden_size"],
            **VISION,
        },
    }


def build_model(config: dict[str, Any]) -> Model:
    """The model of a configuration with fresh weights, drawn from MLX's global random state."""
    settings = ModelConfig.from_dict(dict(config))
    settings.text_config = TextConfig.from_dict(config)
    settings.vision_config = VisionConfig.from_dict(config["vision_config"])
    model = Model(settings)
    embedding = model.language_model.model.embed_tokens
    embedding.weight = mx.random.normal(embedding.weight.shape) * 0.02
    mx.eval(model.parameters())
    return model


def _save_weights(model: Model, path: Path) -> None:
    """Write the weights under Hugging Face's names and axis order."""
    weights: dict[str, mx.array] = {}
    for name, value in cast("list[tuple[str, mx.array]]", tree_flatten(model.parameters())):
        if name.startswith("vision_tower."):
            name = name.replace("vision_tower.", "visual.", 1)
            if name.endswith("patch_embed.proj.weight"):
                value = value.transpose(0, 4, 1, 2, 3)
        else:
            name = name.replace("language_model.model.", "model.", 1)
        weights[name] = mx.contiguous(value)
    mx.save_safetensors(str(path), weights, metadata={"format": "pt"})


def write_checkpoint(folder: Path, model: Model, tokenizer: Tokenizer) -> None:
    """Write the whole checkpoint into an existing empty folder."""
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in checkpoint_files(tokenizer).items():
        (folder / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    _save_weights(model, folder / "model.safetensors")


def check_checkpoint(folder: Path, images: Sequence[Image.Image], features: mx.array) -> None:
    """Load a checkpoint as its users will and compare what its vision tower says with what the warm-up computed."""
    model, processor = mlx_vlm.load(str(folder))
    inputs = processor.image_processor(images=list(images))
    said = model.vision_tower(mx.array(inputs["pixel_values"]), mx.array(inputs["image_grid_thw"]))
    difference = float(mx.abs(said.reshape(features.shape) - features).max())
    if difference > 1e-3:
        raise RuntimeError(f"{folder}: the vision tower differs by {difference:.1e} after loading")
