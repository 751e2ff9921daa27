"""Generation with a Hugging Face model through a paged cache, many requests at a time.

Requests join and leave between steps, long prompts are computed in chunks beside others that
decode, and when blocks run out the youngest request waits: its blocks go to CPU memory, or, where
there is no room, are given up and computed again. Yu et al., "Orca", 2022; Kwon et al.,
"Efficient Memory Management for Large Language Model Serving with PagedAttention", 2023.
"""

from __future__ import annotations

import importlib
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from attn_paged._pool import OutOfBlocksError
from attn_paged.cache import PagedBatch, PagedKVCache

__all__ = [
    "IMPLEMENTATION",
    "ContinuousBatching",
    "cache_for",
    "greedy",
    "paged_attention_forward",
    "register",
]

IMPLEMENTATION = "attn_paged"
"""Name under which transformers knows the attention of this package."""
_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})


def greedy(logits: torch.Tensor) -> torch.Tensor:
    """Return the likeliest token of each row.

    Parameters
    ----------
    logits : Tensor, shape (B, vocabulary)
        Scores of the next token.

    Returns
    -------
    Tensor, shape (B,), int64
        Token ids.
    """
    return logits.argmax(-1)


@dataclass(eq=False)
class _Request:
    name: int
    tokens: list[int]
    stop: int  # length at which it is done
    eos: frozenset[int]
    prompt: int
    sequence: int | None = field(default=None)

    @property
    def is_done(self) -> bool:
        last_is_eos = len(self.tokens) > self.prompt and self.tokens[-1] in self.eos
        return len(self.tokens) >= self.stop or last_is_eos


class ContinuousBatching:
    """Generate for many requests at a time, with a model of `transformers`.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal language model whose attention is chosen by name, such as LLaMA, Mistral or Qwen.
        From now on it uses the attention of this package.
    cache : PagedKVCache
        A cache of the model's layers, heads and dtype, on its device; `cache_for` makes one.
    chunk : int, optional
        Compute at most so many tokens of a request in one step.
    choose : callable, default greedy
        Takes logits (B, vocabulary) and returns the next tokens (B,).

    Raises
    ------
    ValueError
        The cache does not fit the model, or the model's layers are not all attention that is chosen
        by name and sees all past tokens or a window of them.
    ModuleNotFoundError
        transformers is not installed.

    Notes
    -----
    With the same choices the tokens are those of ``model.generate``, up to what rounding decides.
    """

    def __init__(
        self,
        model: Any,
        cache: PagedKVCache,
        *,
        chunk: int | None = None,
        choose: Callable[[torch.Tensor], torch.Tensor] = greedy,
    ) -> None:
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk must be at least 1 or None, got {chunk}")
        if cache.num_layers != model.config.num_hidden_layers:
            raise ValueError(
                f"cache must have the model's {model.config.num_hidden_layers} layers, got "
                f"{cache.num_layers}"
            )
        _take_over(model)
        self.cache = cache
        self.num_preemptions = 0
        self._model = model
        self._chunk = chunk
        self._choose = choose
        self._waiting: deque[_Request] = deque()
        self._running: list[_Request] = []
        self._num_named = 0

    @property
    def is_idle(self) -> bool:
        """Whether no request is left."""
        return not self._waiting and not self._running

    def add(
        self, prompt: Sequence[int] | torch.Tensor, max_new_tokens: int, eos: Collection[int] = ()
    ) -> int:
        """Take a request, which joins as soon as there is room.

        Parameters
        ----------
        prompt : sequence of int, or Tensor of integers
            Token ids, at least one.
        max_new_tokens : int
            How many to generate at most.
        eos : sequence of int, default ()
            Tokens that end it.

        Returns
        -------
        int
            The request's name.

        Raises
        ------
        ValueError
            The prompt is empty, or the cache is too small for this request alone.
        """
        if len(prompt) == 0:
            raise ValueError("prompt must have a token, got none")
        if not isinstance(eos, Collection):
            raise ValueError(f"eos must be a list of token ids, got {eos!r}")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        tokens = [int(token) for token in prompt]
        stop = len(tokens) + max_new_tokens
        capacity = self.cache.num_blocks * self.cache.block_size
        if stop > capacity:
            raise ValueError(
                f"a request may have at most the cache's {capacity} tokens, got {stop}"
            )
        self._num_named += 1
        self._waiting.append(
            _Request(self._num_named, tokens, stop, frozenset(eos), prompt=len(tokens))
        )
        return self._num_named

    @torch.no_grad()
    def step(self) -> dict[int, list[int]]:
        """Run the model once over what all running requests have to compute.

        Returns
        -------
        dict of int to list of int
            Requests that this step finished, with the tokens they generated.

        Raises
        ------
        OutOfBlocksError
            No request runs and the first that waits does not fit beside sequences that others have
            in the cache. Once these are freed, steps go on.
        """
        self._reserve()
        self._admit()
        if not self._running:
            return {}
        batch = self.cache.batch([_named(request) for request in self._running], self._chunk)
        tokens = [token for request in self._running for token in self._unwritten(request)]
        written = self._written()
        logits = self._model(
            input_ids=torch.tensor([tokens], device=self.cache.device),
            position_ids=batch.positions[None],
            use_cache=False,
            logits_to_keep=batch.cu_seqlens_q[1:].long() - 1,
            paged_cache=self.cache,
            paged_batch=batch,
        ).logits[0]
        if any(before == now for before, now in zip(written, self._written(), strict=True)):
            raise RuntimeError("model must write keys and values of all layers, it left some out")
        chosen = self._choose(logits).tolist()
        for request, token in zip(self._running, chosen, strict=True):
            if self.cache.written(_named(request)) == len(request.tokens):
                request.tokens.append(token)
        return self._retire()

    def run(self) -> Iterator[tuple[int, list[int]]]:
        """Step until no request is left.

        Yields
        ------
        name : int
            A finished request.
        tokens : list of int
            What it generated.

        Raises
        ------
        OutOfBlocksError
            As in `step`.
        """
        while not self.is_idle:
            yield from self.step().items()

    def _reserve(self) -> None:
        """Give each running request slots for the token it has just generated."""
        for request in list(self._running):
            while request in self._running:
                sequence = _named(request)
                try:
                    self.cache.append(sequence, request.tokens[self.cache.length(sequence) :])
                    break
                except OutOfBlocksError:
                    self._preempt(self._running[-1])

    def _admit(self) -> None:
        """Let requests join in the order they came, as long as there are blocks."""
        while self._waiting:
            request = self._waiting[0]
            try:
                if request.sequence is None:
                    request.sequence = self.cache.allocate(request.tokens)
                else:
                    self._resume(request.sequence, request.tokens)
            except OutOfBlocksError:
                if not self._running:  # none of them will give blocks back
                    raise
                return
            self._running.append(self._waiting.popleft())

    def _resume(self, sequence: int, tokens: list[int]) -> None:
        """Bring a request back with room for its next token, or leave it where it is."""
        self.cache.swap_in(sequence)
        try:
            self.cache.append(sequence, tokens[self.cache.length(sequence) :])
        except OutOfBlocksError:
            self.cache.swap_out(sequence)
            raise

    def _preempt(self, request: _Request) -> None:
        self.num_preemptions += 1
        self._running.remove(request)
        self._waiting.appendleft(request)
        sequence = _named(request)
        try:
            self.cache.swap_out(sequence)
        except OutOfBlocksError:
            self.cache.free(sequence)
            request.sequence = None

    def _written(self) -> list[int]:
        return [self.cache.written(_named(request)) for request in self._running]

    def _unwritten(self, request: _Request) -> list[int]:
        start = self.cache.written(_named(request))
        stop = len(request.tokens) if self._chunk is None else start + self._chunk
        return request.tokens[start:stop]

    def _retire(self) -> dict[int, list[int]]:
        done = {}
        for request in [request for request in self._running if request.is_done]:
            self._running.remove(request)
            self.cache.free(_named(request))
            done[request.name] = request.tokens[request.prompt :]
        return done


def cache_for(model: Any, num_blocks: int, block_size: int = 16, **options: Any) -> PagedKVCache:
    """Make a cache for a model of `transformers`.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        The model.
    num_blocks : int
        Blocks of the cache.
    block_size : int, default 16
        Tokens of a block.
    **options
        Keyword arguments of `PagedKVCache`.

    Returns
    -------
    PagedKVCache
        Of the model's layers, key heads, head dimensions, dtype and device.
    """
    config = model.config
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    head_dim_v = head_dim
    if getattr(config, "kv_lora_rank", None):  # a key of latent attention has two parts
        head_dim = config.qk_nope_head_dim + config.qk_rope_head_dim
        head_dim_v = config.v_head_dim
    return PagedKVCache(
        num_blocks,
        block_size,
        getattr(config, "num_key_value_heads", None) or heads,  # GPT-2 and others say nothing
        head_dim,
        **{
            "head_dim_v": head_dim_v,
            "num_layers": config.num_hidden_layers,
            "dtype": model.dtype,
            "device": model.device,
            **options,
        },
    )


def register() -> None:
    """Make the attention of this package known to transformers as "attn_paged"."""
    transformers = importlib.import_module("transformers")
    transformers.AttentionInterface.register(IMPLEMENTATION, paged_attention_forward)


def paged_attention_forward(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    paged_cache: PagedKVCache | None = None,
    paged_batch: PagedBatch | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Write keys and values to a paged cache and attend, as transformers calls attention.

    Parameters
    ----------
    module : torch.nn.Module
        The attention layer; its `layer_idx` is the layer of the cache.
    query : Tensor, shape (1, H, T, D)
        All new tokens of the batch, one request after the other.
    key, value : Tensor, shape (1, H_KV, T, D)
        Their keys, turned by their positions, and values.
    attention_mask : None
        Must be None: the batch says who sees what.
    scaling : float, optional
        Factor of the scores.
    dropout : float, default 0.0
        Must be 0.
    paged_cache : PagedKVCache
        Passed through the model by `ContinuousBatching`.
    paged_batch : PagedBatch
        Likewise.
    sliding_window : int, optional
        A query sees so many keys, its own included.
    softcap : float, optional
        As in `paged_attention`.
    s_aux : Tensor, shape (H,), optional
        Sinks.
    **_
        What transformers passes to every implementation.

    Returns
    -------
    out : Tensor, shape (1, T, H, D)
        Attention.
    weights : None
        They are never formed.

    Raises
    ------
    ValueError
        The model is not called by `ContinuousBatching` or does not pass on what it is called with,
        asks for dropout or a mask, or attends twice in one layer.
    """
    if paged_cache is None or paged_batch is None:
        raise ValueError(
            "paged_cache and paged_batch must be passed to the model, and by it to its attention, "
            "got None"
        )
    if attention_mask is not None or dropout:
        raise ValueError("attention_mask must be None and dropout 0 over a paged cache")
    if module.layer_idx not in paged_batch._unwritten_layers:
        raise ValueError(f"a layer must attend once, layer {module.layer_idx} attends again")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, heads, D]
    paged_cache.write(module.layer_idx, k, v, paged_batch)
    out = paged_cache.attend(
        module.layer_idx,
        q,
        paged_batch,
        softmax_scale=scaling,
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        softcap=softcap or 0.0,
        sinks=s_aux,
    )
    return out[None], None


def _take_over(model: Any) -> None:
    """Let a model call the attention of this package; refuse one that would not generate by it."""
    name = type(model).__name__
    if getattr(model, "_is_stateful", False):
        raise ValueError(f"model must remember keys and values alone, {name} has another state too")
    others = {*(getattr(model.config, "layer_types", None) or ())} - _LAYER_TYPES
    if others:
        raise ValueError(
            f"model must have layers of {sorted(_LAYER_TYPES)}, {name} has {sorted(others)}"
        )
    register()
    model.set_attn_implementation(IMPLEMENTATION)
    if model.config._attn_implementation != IMPLEMENTATION:
        raise ValueError(f"model must take its attention from AttentionInterface, {name} does not")


def _named(request: _Request) -> int:
    if request.sequence is None:
        raise RuntimeError(f"request {request.name} has no sequence")
    return request.sequence
