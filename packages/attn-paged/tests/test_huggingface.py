"""A Hugging Face model through the paged cache: the tokens of generate()."""

from __future__ import annotations

import pytest
import torch

from attn_paged import OutOfBlocksError, PagedKVCache
from attn_paged.huggingface import ContinuousBatching, cache_for

transformers = pytest.importorskip("transformers")

LENGTHS = (5, 1, 37, 18, 9, 24)
NEW_TOKENS = (12, 20, 6, 15, 1, 9)


@pytest.fixture(scope="module", params=["llama", "mistral-window", "gpt2"])
def model(request):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.5,  # logits far apart: rounding decides nothing
        "tie_word_embeddings": False,
    }
    if request.param == "gpt2":  # as many key heads as query heads
        del sizes["num_key_value_heads"]
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    elif request.param == "llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    else:
        config = transformers.MistralConfig(**sizes, sliding_window=8)
        model = transformers.MistralForCausalLM(config)
    return model.eval()


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(97, (n,), generator=generator).tolist() for n in LENGTHS]


@pytest.fixture(scope="module")
def expected(model, prompts):
    model.set_attn_implementation("sdpa")
    return [generate(model, *pair) for pair in zip(prompts, NEW_TOKENS, strict=True)]


def generate(model, prompt, count, eos=None):
    ids = torch.tensor([prompt])
    options = {"max_new_tokens": count, "do_sample": False, "eos_token_id": eos, "pad_token_id": 0}
    result = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return result[0, len(prompt) :].tolist()


def run(batching, prompts, *, every=0):
    """Results in the order of the prompts; a new request joins after `every` steps."""
    names, results, waiting = [], {}, list(zip(prompts, NEW_TOKENS, strict=True))
    steps = 0
    while waiting or not batching.is_idle:
        while waiting and (not every or steps % every == 0):
            names.append(batching.add(*waiting.pop(0)))
            if every:
                break
        results.update(batching.step())
        batching.cache.check_invariants()
        steps += 1
    return [results[name] for name in names]


@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize("every", [0, 2], ids=["all-at-once", "one-by-one"])
def test_tokens_are_those_of_generate(model, prompts, expected, every, chunk):
    batching = ContinuousBatching(model, cache_for(model, 64, 4), chunk=chunk)
    assert run(batching, prompts, every=every) == expected
    assert batching.num_preemptions == 0
    assert batching.cache.num_free_blocks == 64


@pytest.mark.parametrize("host_blocks", [0, 64], ids=["recomputed", "swapped"])
def test_requests_that_run_out_of_blocks_are_resumed(model, prompts, expected, host_blocks):
    cache = cache_for(model, 15, 4, num_host_blocks=host_blocks)
    batching = ContinuousBatching(model, cache)
    assert run(batching, prompts) == expected
    assert batching.num_preemptions > 0
    assert (cache.num_free_blocks, cache.num_free_host_blocks) == (15, host_blocks)


def test_an_end_token_ends_a_request(model, prompts, expected):
    eos = expected[0][4]
    batching = ContinuousBatching(model, cache_for(model, 64, 4))
    batching.add(prompts[0], NEW_TOKENS[0], eos=[eos])
    [(_, tokens)] = batching.run()
    assert tokens == expected[0][: expected[0].index(eos) + 1]


def test_a_common_prompt_is_computed_once(model, prompts, expected):
    batching = ContinuousBatching(model, cache_for(model, 64, 4))
    results = []
    for _ in range(2):
        batching.add(torch.tensor(prompts[2]), NEW_TOKENS[2])
        results += [tokens for _, tokens in batching.run()]
    sequence = batching.cache.allocate(prompts[2])
    assert batching.cache.written(sequence) == 36
    assert results == [expected[2], expected[2]]


def test_blocks_that_others_hold_are_missed(model, prompts, expected):
    """Instead of waiting for them for ever."""
    batching = ContinuousBatching(model, cache_for(model, 5, 4))
    other = batching.cache.allocate(16)
    batching.add(prompts[0], NEW_TOKENS[0])
    for _ in range(2):
        with pytest.raises(OutOfBlocksError, match="2 cache blocks are needed and 1 are free"):
            list(batching.run())
    batching.cache.free(other)
    assert [tokens for _, tokens in batching.run()] == [expected[0]]


def test_bad_requests_are_named(model):
    batching = ContinuousBatching(model, cache_for(model, 4, 4))
    with pytest.raises(ValueError, match="prompt must have a token"):
        batching.add([], 3)
    with pytest.raises(ValueError, match="eos must be a list of token ids, got 7"):
        batching.add([1, 2], 3, eos=7)
    with pytest.raises(ValueError, match="at most the cache's 16 tokens, got 17"):
        batching.add([1, 2], 15)
    with pytest.raises(ValueError, match="cache must have the model's 2 layers, got 1"):
        ContinuousBatching(model, cache_for(model, 4, 4, num_layers=1))
    with pytest.raises(ValueError, match="paged_cache and paged_batch must be passed"):
        model(torch.tensor([[1, 2]]))


SMALL = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}


def new_model(name, **sizes):
    return getattr(transformers, f"{name}ForCausalLM")(
        getattr(transformers, f"{name}Config")(**SMALL, **sizes)
    )


@pytest.mark.parametrize(
    "name, sizes, message",
    [
        ("Bloom", {"n_head": 4}, "model must take its attention from AttentionInterface"),
        ("Mamba", {"state_size": 4}, "model must remember keys and values alone"),
        (
            "Llama",
            HEADS,
            r"model must have layers of .*, LlamaForCausalLM has \['chunked_attention'\]",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore")  # transformers' own
def test_models_that_would_generate_something_else_are_refused(name, sizes, message):
    model = new_model(name, **sizes)
    if name == "Llama":
        model.config.layer_types = ["full_attention", "chunked_attention"]
    cache = PagedKVCache(8, 4, heads_kv=2, head_dim=8, num_layers=2)
    with pytest.raises(ValueError, match=message):
        ContinuousBatching(model, cache)


def test_keys_wider_than_values(prompts):
    """Latent attention, as transformers expands it."""
    model = new_model(
        "DeepseekV3",
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=48,
        first_k_dense_replace=2,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=12,
        qk_rope_head_dim=8,
        v_head_dim=10,
        initializer_range=0.5,
    ).eval()
    wanted = [generate(model, prompt, 6) for prompt in prompts[:3]]
    batching = ContinuousBatching(model, cache_for(model, 64, 4), chunk=7)
    names = [batching.add(prompt, 6) for prompt in prompts[:3]]
    results = dict(batching.run())
    assert [results[name] for name in names] == wanted


def test_a_layer_that_attends_twice_is_refused():
    model = new_model("DiffLlama", **HEADS).eval()
    batching = ContinuousBatching(model, cache_for(model, 8, 4))
    batching.add([1, 2, 3], 2)
    with pytest.raises(ValueError, match="a layer must attend once, layer 0 attends again"):
        batching.step()


def test_a_layer_that_writes_nothing_is_noticed():
    model = new_model("Llama", **HEADS).eval()
    batching = ContinuousBatching(model, cache_for(model, 8, 4))
    model.model.layers[1].self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
    batching.add([1, 2, 3], 2)
    with pytest.raises(RuntimeError, match="model must write keys and values of all layers"):
        batching.step()
