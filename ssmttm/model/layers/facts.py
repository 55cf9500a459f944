"""The facts of this package's layers; the memory of each is that of PyTorch's kernels unless `on_cuda`.

`saved` counts the tensors that autograd keeps of each sub-layer; tests/harness/plan compares it with real engines.
"""

import math
from collections.abc import Mapping

from ssmttm.model.chunks import even_chunk
from ssmttm.model.layers.layer import How, Layer, LayerConfig, Pass, Saved, register


class Mamba2(Layer):
    """The Mamba-2 mixer."""

    name = "mamba2"
    module = "ssmttm.model.layers.mamba2:Mamba2Mixer"
    keys = frozenset({"d_state", "d_conv", "expand", "ssm_head_dim", "n_groups"})
    is_recurrent = True

    def check(self, config: LayerConfig) -> None:
        """Require that heads divide the inner width, and groups the heads."""
        if config.d_inner % config.ssm_head_dim:
            raise ValueError(
                f"expand * d_model {config.d_inner} does not divide into heads of {config.ssm_head_dim}: choose a "
                f"d_model with {config.expand} * d_model a multiple of {config.ssm_head_dim}"
            )
        if config.n_ssm_heads % config.n_groups:
            raise ValueError(
                f"n_groups {config.n_groups} does not divide the {config.n_ssm_heads} heads of the scan "
                f"(expand * d_model / ssm_head_dim): choose a divisor of {config.n_ssm_heads}"
            )

    def width_step(self, config: LayerConfig) -> int:
        """Return the smallest width with whole heads in whole groups."""
        scan = config.ssm_head_dim * config.n_groups
        return scan // math.gcd(config.expand, scan)

    def matrices(self, config: LayerConfig) -> tuple[tuple[int, int], ...]:
        """Return the projections in and out."""
        return (config.d_model, _projected(config)), (config.d_inner, config.d_model)

    def vectors(self, config: LayerConfig) -> int:
        """Count the convolution, A, D and dt_bias of the heads, and the norm."""
        return _mixed(config) * (config.d_conv + 1) + 3 * config.n_ssm_heads + config.d_inner

    def flops(self, config: LayerConfig, forward: Pass) -> Mapping[str, float]:
        """Return the operations of projections and convolution, and those of the scan."""
        di, states = config.d_inner, config.n_groups * config.d_state
        products = 2 * sum(rows * columns for rows, columns in self.matrices(config))
        convolution = 2 * config.d_conv * _mixed(config)
        chunk = min(forward.convention.scan_chunk, forward.length)
        # Scores C B^T, their product with the values, and states written and read.
        scan = 2 * chunk * states + 2 * chunk * di + 4 * config.d_state * di
        return {
            "mixer": forward.n_layers * (products + convolution) * forward.a_position,
            "scan": forward.n_layers * scan * forward.a_position,
        }

    def saved(self, config: LayerConfig, length: int, how: How) -> Saved:
        """Count what the fused kernel keeps, or what the chunked scan keeps."""
        di, heads, half = config.d_inner, config.n_ssm_heads, how.half
        projected, mixed = _projected(config), _mixed(config)
        if how.is_fused:  # mamba-ssm keeps the projection and the scan's output, and computes the rest again
            return Saved(half * (projected + 2 * di), half * (projected + mixed) + 3 * di)
        chunk = even_chunk(config.d_state, length)
        entering = di * config.d_state / chunk
        inside = 2 * heads * chunk + 3 * di + entering + 4 * heads  # fp32 whatever the precision
        around = projected + 2 * mixed + 2 * di
        return Saved(half * around + inside + 3 * di, 3 * heads * chunk + 6 * di + entering)


def _projected(config: LayerConfig) -> int:
    """Channels of the projection in: the gate, the convolution's input and the step sizes."""
    return config.d_inner + _mixed(config) + config.n_ssm_heads


def _mixed(config: LayerConfig) -> int:
    """Channels of the convolution: the scan's values, B and C."""
    return config.d_inner + 2 * config.n_groups * config.d_state


class _Attention(Layer):
    keys = frozenset({"head_dim"})

    def check(self, config: LayerConfig) -> None:
        """Require that heads divide the width."""
        if config.d_model % config.head_dim:
            raise ValueError(
                f"d_model {config.d_model} does not divide into heads of {config.head_dim}: "
                f"choose a multiple of {config.head_dim}"
            )

    def width_step(self, config: LayerConfig) -> int:
        """Return the width of a head."""
        return config.head_dim

    def matrices(self, config: LayerConfig) -> tuple[tuple[int, int], ...]:
        """Return the projections to queries, keys and values, and the projection out."""
        return ((config.d_model, config.d_model),) * 4


class SelfAttention(_Attention):
    """Causal attention over the sequence."""

    name = "self_attention"
    module = "ssmttm.model.layers.self_attention:SelfAttention"

    def flops(self, config: LayerConfig, forward: Pass) -> Mapping[str, float]:
        """Return the operations of four projections and of two products with the visible positions."""
        d, length = config.d_model, forward.length
        seen = length if forward.convention.attention == "full" else (length + 1) / 2
        return {"attention": forward.n_layers * (8 * d * d + 4 * seen * d) * forward.a_position}

    def saved(self, config: LayerConfig, length: int, how: How) -> Saved:  # noqa: ARG002
        """Count queries, keys, values and the output, with a logarithm for each head."""
        d = config.d_model
        return Saved(how.half * 4 * d + d / config.head_dim, how.half * 6 * d)


class CrossAttention(_Attention):
    """Attention to the text."""

    name = "cross_attention"
    module = "ssmttm.model.layers.cross_attention:CrossAttention"
    attends_to_text = True

    def flops(self, config: LayerConfig, forward: Pass) -> Mapping[str, float]:
        """Return the operations of two projections for each position of the sequence and two for each of the text."""
        d = config.d_model
        a_position = (4 * d * d + 4 * forward.text_positions * d) * forward.a_position
        return {"cross_attention": forward.n_layers * (a_position + 4 * d * d * forward.a_text)}

    def saved(self, config: LayerConfig, length: int, how: How) -> Saved:  # noqa: ARG002
        """Count queries and the output, with a logarithm for each head, and the text's keys and values."""
        d = config.d_model
        return Saved(how.half * 2 * d + d / config.head_dim, how.half * 4 * d, of_text=2 * d)


class FeedForward(Layer):
    """Two linear layers, applied to each position."""

    name = "feed_forward"
    module = "ssmttm.model.layers.feed_forward:FeedForward"
    keys = frozenset({"ff_mult"})

    def matrices(self, config: LayerConfig) -> tuple[tuple[int, int], ...]:
        """Return the projections up and down."""
        inner = config.ff_mult * config.d_model
        return (config.d_model, inner), (inner, config.d_model)

    def vectors(self, config: LayerConfig) -> int:
        """Count the biases."""
        return config.ff_mult * config.d_model + config.d_model

    def flops(self, config: LayerConfig, forward: Pass) -> Mapping[str, float]:
        """Return the operations of both projections."""
        d = config.d_model
        return {"feed_forward": forward.n_layers * 4 * config.ff_mult * d * d * forward.a_position}

    def saved(self, config: LayerConfig, length: int, how: How) -> Saved:  # noqa: ARG002
        """Count the values before and after GELU, and what dropout keeps."""
        inner = config.ff_mult * config.d_model
        dropped = how.mask(inner) if config.dropout > 0 else 0.0
        return Saved(2 * how.half * inner + dropped, 2 * how.half * inner)


for _layer in (Mamba2(), SelfAttention(), CrossAttention(), FeedForward()):
    register(_layer)
