"""A dense GPT of megatron-core in the form of Hugging Face's transformers: its names, its shapes, its `config.json`.

Which kind of model it is there follows from the normalization and the activation (`FAMILIES`). What that kind cannot
express is refused: a file that loads and computes something else is worse than none.

Both sides rotate positions the same way, the first half of a head's channels against the second. They differ in
three things. megatron-core stacks layers along the first axis. It stores for each group of queries its query heads, its
key and its value, one after the other; transformers stores all queries, all keys and all values. And it stores the gate
of a gated MLP above the other half.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from bridge.training.checkpointing.conversion.plan import Piece, Tensor
from bridge.training.checkpointing.errors import CheckpointMismatchError
from bridge.training.checkpointing.export.plan import Target, box, whole
from bridge.training.config import ConfigContainer, ConfigError, GPTModelConfig

HARMLESS_OVERRIDES = frozenset(
    {
        *("apply_rope_fusion", "attention_softmax_in_fp32", "bias_activation_fusion", "bias_dropout_fusion"),
        *("cross_entropy_loss_fusion", "deterministic_mode", "disable_bf16_reduced_precision_matmul"),
        *("distribute_saved_activations", "gradient_accumulation_fusion", "masked_softmax_fusion"),
        *("memory_efficient_layer_norm", "output_layer_init_method", "perform_initialization", "persist_layer_norm"),
        *("tp_comm_overlap", "use_cpu_initialization"),
    }
)
"""Fields of megatron-core's TransformerConfig that say how something is computed, and not what."""

_ADAPTER = ".adapter."
"""In the keys of adapters, and in no others."""


@dataclass(frozen=True)
class Family:
    """A kind of model of transformers."""

    model_type: str
    architecture: str
    gate: str
    """Name of the gate's layer; empty where the MLP has none."""
    up: str
    down: str
    epsilon: str
    """Its name of the number that normalization adds to the variance."""
    rotates_parts: bool = False
    """Whether some of a head's channels can be left as they are."""
    has_head_size: bool = False
    """Whether heads can have another size than `hidden_size / num_attention_heads`."""
    has_biases: bool = False
    """Whether all linear layers can have a bias."""


FAMILIES = {
    ("RMSNorm", "swiglu"): Family(
        *("llama", "LlamaForCausalLM", "gate_proj", "up_proj", "down_proj", "rms_norm_eps"),
        has_head_size=True,
        has_biases=True,
    ),
    ("LayerNorm", "swiglu"): Family(
        *("stablelm", "StableLmForCausalLM", "gate_proj", "up_proj", "down_proj", "layer_norm_eps"),
        rotates_parts=True,
    ),
    ("LayerNorm", "gelu"): Family(
        *("starcoder2", "Starcoder2ForCausalLM", "", "c_fc", "c_proj", "norm_epsilon"), has_biases=True
    ),
}
"""By normalization and activation, as `model` has them."""


@dataclass(frozen=True)
class Layout:
    """A model in the form of transformers."""

    targets: list[Target]
    config: dict[str, Any]
    """Of `config.json`, but for the type of the values."""


def layout_for(config: Mapping[str, Any] | None, tensors: Mapping[str, Tensor], place: str) -> Layout:
    """How a model is written for transformers.

    Args:
        config: the checkpoint's `run_config.yaml`.
        tensors: all of the model, by key.
        place: the checkpoint, for messages.

    Raises:
        CheckpointMismatchError: transformers has no such model, or it is not known what model it is. The message names
            everything that does not fit.
    """
    model = _configured(config, place)
    family = FAMILIES.get((model.normalization, model.activation))
    problems = _misfits(model, family)
    if any(_ADAPTER in key for key in tensors):
        problems.append("it holds adapters, which have to be merged first")
    if problems or family is None:
        raise CheckpointMismatchError(
            f"--hf-layout: the model in {place} has no equivalent in transformers: {'; '.join(problems)}; leave out "
            "--hf-layout to export it under megatron-core's names"
        )
    layout = _Mapping(model, family, tensors, place)
    targets = list(layout.targets())
    left = sorted(tensors.keys() - layout.used)
    if left:
        raise CheckpointMismatchError(
            f"--hf-layout: transformers' {family.architecture} has no place for {', '.join(left[:5])}"
            f"{' ...' if len(left) > 5 else ''} of {place}; leave out --hf-layout to export it under megatron-core's "
            "names"
        )
    return Layout(targets, _config_of(model, family, layout.vocabulary))


def _configured(config: Mapping[str, Any] | None, place: str) -> GPTModelConfig:
    if config is None:
        raise CheckpointMismatchError(
            f"--hf-layout: {place} has no run_config.yaml, which says what model it is; leave out --hf-layout"
        )
    try:
        cfg = ConfigContainer.from_dict({key: config[key] for key in ("_target_", "model") if key in config})
    except ConfigError as error:
        raise CheckpointMismatchError(
            f"--hf-layout: the run_config.yaml in {place} is not that of a GPT as this version describes it ({error}); "
            "leave out --hf-layout"
        ) from error
    return cfg.model


def _misfits(model: GPTModelConfig, family: Family | None) -> list[str]:
    """What transformers cannot express, a phrase each that begins with the setting."""
    problems = []
    if family is None:
        problems.append(f"model.activation is {model.activation!r} with model.normalization {model.normalization!r}")
    if model.position_embedding_type != "rope":
        problems.append(f"model.position_embedding_type is {model.position_embedding_type!r}, and only 'rope' fits")
    if model.num_moe_experts is not None:
        problems.append(f"model.num_moe_experts is {model.num_moe_experts}, and only dense models fit")
    for name, value in sorted(model.transformer_overrides.items()):
        if name not in HARMLESS_OVERRIDES:
            problems.append(f"model.transformer_overrides.{name} is {value!r}, which may change what is computed")
    if family is None:
        return problems
    if model.rotary_percent != 1 and not family.rotates_parts:
        problems.append(f"model.rotary_percent is {model.rotary_percent}, and {family.architecture} rotates everything")
    if model.add_bias_linear and not family.has_biases:
        problems.append(f"model.add_bias_linear is true, and {family.architecture} has no biases in all linear layers")
    if not family.has_head_size and _head_size(model) * model.num_attention_heads != model.hidden_size:
        problems.append(
            f"model.kv_channels is {model.kv_channels}, and heads of {family.architecture} share model.hidden_size"
        )
    return problems


def _head_size(model: GPTModelConfig) -> int:
    return model.kv_channels or model.hidden_size // model.num_attention_heads


def _config_of(model: GPTModelConfig, family: Family, vocabulary: int) -> dict[str, Any]:
    """The content of `config.json`. Which tokens begin and end a text is the tokenizer's to say."""
    config: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": vocabulary,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size or 4 * model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups or model.num_attention_heads,
        "hidden_act": "silu" if model.activation == "swiglu" else "gelu",
        "max_position_embeddings": model.seq_length,
        # Older versions read the first, newer ones the second.
        "rope_theta": float(model.rotary_base),
        "rope_parameters": _rotation_of(model, family),
        "initializer_range": model.init_method_std,
        "attention_dropout": model.attention_dropout,
        "tie_word_embeddings": model.share_embeddings_and_output_weights,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        family.epsilon: model.layernorm_epsilon,
    }
    if family.model_type == "llama":
        biases = {"attention_bias": model.add_bias_linear, "mlp_bias": model.add_bias_linear}
        return config | biases | {"head_dim": _head_size(model)}
    if family.model_type == "stablelm":
        parts = {"partial_rotary_factor": model.rotary_percent, "hidden_dropout": model.hidden_dropout}
        return config | parts | {"use_qkv_bias": False, "qk_layernorm": False, "use_parallel_residual": False}
    dropout = {"residual_dropout": model.hidden_dropout, "embedding_dropout": model.hidden_dropout}
    return config | dropout | {"use_bias": model.add_bias_linear, "sliding_window": None}


def _rotation_of(model: GPTModelConfig, family: Family) -> dict[str, Any]:
    rotation: dict[str, Any] = {"rope_type": "default", "rope_theta": float(model.rotary_base)}
    return rotation | ({"partial_rotary_factor": model.rotary_percent} if family.rotates_parts else {})


class _Mapping:
    """From stored tensors to those of a family."""

    def __init__(self, model: GPTModelConfig, family: Family, tensors: Mapping[str, Tensor], place: str) -> None:
        self._model, self._family, self._tensors, self._place = model, family, tensors, place
        self.used: set[str] = set()
        self.vocabulary = 0

    def targets(self) -> Iterator[Target]:
        """All tensors, in the order in which they are computed with.

        Raises:
            CheckpointMismatchError: a stored tensor is missing, or not of the shape that the configuration tells.
        """
        model = self._model
        embedding = self._tensors.get("embedding.word_embeddings.weight")
        self.vocabulary = 0 if embedding is None or not embedding.shape else embedding.shape[0]
        words = (self.vocabulary, model.hidden_size)
        yield self._whole("model.embed_tokens.weight", "embedding.word_embeddings.weight", words)
        for layer in range(model.num_layers):
            yield from self._attention(layer)
            yield from self._mlp(layer)
        yield from self._norm("model.norm", "decoder.final_layernorm.", None)
        if not model.share_embeddings_and_output_weights:
            yield self._whole("lm_head.weight", "output_layer.weight", words)

    def _attention(self, layer: int) -> Iterator[Target]:
        model, stored = self._model, "decoder.layers.self_attention."
        to = f"model.layers.{layer}"
        size = _head_size(model)
        groups = model.num_query_groups or model.num_attention_heads
        queries = model.num_attention_heads // groups * size
        yield from self._norm(f"{to}.input_layernorm", f"{stored}linear_qkv.layer_norm_", layer)
        for kind, rest in self._kinds(model.hidden_size):
            source = self._stored(
                f"{stored}linear_qkv.{kind}", (model.num_layers, groups * (queries + 2 * size), *rest)
            )
            for name, begin, rows in (("q", 0, queries), ("k", queries, size), ("v", queries + size, size)):
                starts = [group * (queries + 2 * size) + begin for group in range(groups)]
                boxes = [self._rows(source, layer, start, rows) for start in starts]
                yield self._target(f"{to}.self_attn.{name}_proj.{kind}", (groups * rows, *rest), source, boxes)
        yield from self._linear(
            f"{to}.self_attn.o_proj", f"{stored}linear_proj", layer, model.hidden_size, groups * queries
        )

    def _mlp(self, layer: int) -> Iterator[Target]:
        model, family, stored = self._model, self._family, "decoder.layers.mlp."
        to = f"model.layers.{layer}"
        inner = model.ffn_hidden_size or 4 * model.hidden_size
        yield from self._norm(f"{to}.post_attention_layernorm", f"{stored}linear_fc1.layer_norm_", layer)
        if family.gate:
            for kind, rest in self._kinds(model.hidden_size):
                source = self._stored(f"{stored}linear_fc1.{kind}", (model.num_layers, 2 * inner, *rest))
                for name, start in ((family.gate, 0), (family.up, inner)):
                    boxes = [self._rows(source, layer, start, inner)]
                    yield self._target(f"{to}.mlp.{name}.{kind}", (inner, *rest), source, boxes)
        else:
            yield from self._linear(f"{to}.mlp.{family.up}", f"{stored}linear_fc1", layer, inner, model.hidden_size)
        yield from self._linear(f"{to}.mlp.{family.down}", f"{stored}linear_fc2", layer, model.hidden_size, inner)

    def _kinds(self, inputs: int) -> list[tuple[str, tuple[int, ...]]]:
        """The parameters of a linear layer, with their axes after the first."""
        return [("weight", (inputs,)), *([("bias", ())] if self._model.add_bias_linear else [])]

    def _linear(self, name: str, stored: str, layer: int, rows: int, inputs: int) -> Iterator[Target]:
        for kind, rest in self._kinds(inputs):
            source = self._stored(f"{stored}.{kind}", (self._model.num_layers, rows, *rest))
            yield self._target(f"{name}.{kind}", (rows, *rest), source, [self._rows(source, layer, 0, rows)])

    def _norm(self, name: str, stored: str, layer: int | None) -> Iterator[Target]:
        size = self._model.hidden_size
        for kind in ("weight", "bias") if self._model.normalization == "LayerNorm" else ("weight",):
            if layer is None:
                yield self._whole(f"{name}.{kind}", f"{stored}{kind}", (size,))
                continue
            source = self._stored(f"{stored}{kind}", (self._model.num_layers, size))
            yield self._target(f"{name}.{kind}", (size,), source, [self._rows(source, layer, 0, size)])

    def _whole(self, name: str, key: str, shape: tuple[int, ...]) -> Target:
        source = self._stored(key, shape)
        return self._target(name, shape, source, [whole(source)])

    def _stored(self, key: str, shape: tuple[int, ...]) -> Tensor:
        found = self._tensors.get(key)
        if found is None:
            raise CheckpointMismatchError(
                f"--hf-layout: {self._place} holds no tensor {key}, which the model of its run_config.yaml has; the "
                "layout is made from checkpoints of torch_dist and zarr with the layers stacked. Leave out --hf-layout"
            )
        if found.shape != shape:
            raise CheckpointMismatchError(
                f"--hf-layout: {key} in {self._place} has the shape {list(found.shape)}, and after its run_config.yaml "
                f"it would have {list(shape)}; leave out --hf-layout"
            )
        self.used.add(key)
        return found

    @staticmethod
    def _rows(tensor: Tensor, layer: int, start: int, rows: int) -> Piece:
        rest = tensor.shape[2:]
        return box(tensor, (layer, start, *(0,) * len(rest)), (1, rows, *rest))

    @staticmethod
    def _target(name: str, shape: tuple[int, ...], source: Tensor, boxes: list[Piece]) -> Target:
        return Target(name, shape, source.dtype, tuple(boxes))
