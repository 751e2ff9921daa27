"""Models of Hugging Face transformers: the same logits and gradients as with eager attention."""

from __future__ import annotations

import warnings

import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from attn_flash import UnsupportedProblemError
from attn_flash.integrations import transformers as hook

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))


def mistral():
    return transformers.MistralForCausalLM(transformers.MistralConfig(**SMALL, sliding_window=5))


def gemma():
    config = transformers.Gemma2Config(
        **SMALL,
        head_dim=16,
        sliding_window=5,
        query_pre_attn_scalar=20,
        attn_logit_softcapping=1.5,
        final_logit_softcapping=10.0,
    )
    return transformers.Gemma2ForCausalLM(config)


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=97, n_positions=128, n_embd=32, n_layer=2, n_head=4, bos_token_id=1,
        eos_token_id=2, pad_token_id=0, scale_attn_by_inverse_layer_idx=True,
        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def gpt_oss():
    config = transformers.GptOssConfig(
        **SMALL, head_dim=16, sliding_window=5, num_local_experts=2, num_experts_per_tok=1,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    return transformers.GptOssForCausalLM(config)


MODELS = pytest.mark.parametrize("make", [llama, mistral, gemma, gpt2, gpt_oss])


@pytest.fixture(autouse=True)
def registered():
    hook.register()
    yield
    hook.unregister()


def build(make):
    torch.manual_seed(0)
    model = make().eval()
    for parameter in model.parameters():  # so that softcaps and sinks matter
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def tokens(rows=3, length=11):
    return torch.randint(3, 97, (rows, length))


def padding(side):
    mask = torch.ones(3, 11, dtype=torch.long)
    columns = {"left": (slice(0, 4), slice(0, 1)), "right": (slice(6, None), slice(10, None))}
    if side != "none":
        mask[0, columns[side][0]] = 0
        mask[2, columns[side][1]] = 0
    return mask


def run(model, implementation, ids, mask, **inputs):
    """Logits of tokens that count, and all gradients of a function of them."""
    model.set_attn_implementation(implementation)
    model.zero_grad()
    logits = model(ids, attention_mask=mask, **inputs).logits
    if mask is not None and mask.dim() == 2:
        logits = logits[mask.bool()]
    logits.tanh().square().sum().backward()
    return logits.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


def check(model, ids, mask, **inputs):
    expected, wanted = run(model, "eager", ids, mask, **inputs)
    actual, grads = run(model, hook.NAME, ids, mask, **inputs)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    assert len(grads) == len(wanted) > 10
    for grad, other in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, other, atol=1e-3, rtol=1e-3)


@pytest.fixture
def masks_seen(monkeypatch):
    """Shapes of the masks that attention is called with."""
    seen = []
    attend = hook.attend

    def record(*args, mask=None, **options):
        seen.append(None if mask is None else tuple(mask.shape))
        return attend(*args, mask=mask, **options)

    monkeypatch.setattr(hook, "attend", record)
    return seen


@MODELS
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_logits_and_gradients(side, make, masks_seen):
    check(build(make), tokens(), padding(side))
    assert set(masks_seen) == {None if side == "none" else (3, 1, 1, 11)}


@MODELS
@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no-cache"])
def test_generate(use_cache, make):
    model = build(make)
    ids, mask = tokens(), padding("left")
    options = {"max_new_tokens": 9, "do_sample": False, "use_cache": use_cache}
    texts = []
    for implementation in ("eager", hook.NAME):
        model.set_attn_implementation(implementation)
        texts.append(model.generate(ids, attention_mask=mask, **options))
    assert torch.equal(*texts)
    assert texts[0].shape[1] > 12


@pytest.mark.parametrize("make", [llama, gemma])
def test_generate_with_a_static_cache(make):
    model = build(make)
    ids, mask = tokens(), padding("left")
    texts = []
    for implementation in ("eager", hook.NAME):
        model.set_attn_implementation(implementation)
        texts.append(
            model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=6,
                do_sample=False,
                cache_implementation="static",
                disable_compile=True,
            )
        )
    assert torch.equal(*texts)


def test_packed_sequences_by_position_ids():
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 0, 1, 2, 3, 4]])
    check(build(llama), tokens(1), None, position_ids=positions, use_cache=False)


def test_packed_sequences_by_lengths():
    model = build(llama)
    ids = tokens(1)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 0, 1, 2, 3, 4]])
    inputs = {"position_ids": positions, "use_cache": False}
    expected, wanted = run(model, "eager", ids, None, **inputs)
    bounds = torch.tensor([0, 4, 6, 11], dtype=torch.int32)
    packed = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 5}
    packed["max_length_k"] = 5
    actual, grads = run(model, hook.NAME, ids, None, **inputs, **packed)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(grads, wanted, atol=1e-3, rtol=1e-3)


def test_a_mask_of_four_dimensions_is_taken_as_it_is(masks_seen):
    mask = torch.zeros(3, 1, 11, 11).masked_fill(torch.rand(3, 1, 11, 11) < 0.4, -1e4)
    mask.diagonal(dim1=2, dim2=3).zero_()
    check(build(llama), tokens(), mask)
    assert set(masks_seen) == {(3, 1, 11, 11)}


def test_an_encoder_sees_both_sides():
    config = transformers.BertConfig(
        **{k: v for k, v in SMALL.items() if k != "num_key_value_heads"},
        attention_probs_dropout_prob=0.0,
    )
    model = build(lambda: transformers.BertModel(config))
    ids, mask = tokens(), padding("right")
    outs = []
    for implementation in ("eager", hook.NAME):
        model.set_attn_implementation(implementation)
        outs.append(model(ids, attention_mask=mask).last_hidden_state[mask.bool()])
    torch.testing.assert_close(*outs, atol=1e-4, rtol=1e-4)


def t5():
    config = transformers.T5Config(
        vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0,
        relative_attention_num_buckets=8, relative_attention_max_distance=16, pad_token_id=0,
        eos_token_id=2, decoder_start_token_id=0,
    )  # fmt: skip
    return build(lambda: transformers.T5ForConditionalGeneration(config))


def test_position_biases_are_learned():
    model = t5()
    inputs = {"input_ids": tokens(), "attention_mask": padding("right"), "labels": tokens(3, 7)}
    results = []
    for implementation in ("eager", hook.NAME):
        model.set_attn_implementation(implementation)
        model.zero_grad()
        output = model(**inputs)
        output.loss.backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        results.append((output.logits.detach(), gradients))
    torch.testing.assert_close(*results, atol=1e-3, rtol=1e-3)
    biases = [grad for name, grad in results[1][1].items() if "relative_attention_bias" in name]
    assert len(biases) == 2
    assert all(grad.abs().max() > 1e-3 for grad in biases)


def test_an_encoder_decoder_generates():
    model, ids = t5(), tokens()
    texts = []
    for implementation in ("eager", hook.NAME):
        model.set_attn_implementation(implementation)
        options = {"max_new_tokens": 9, "do_sample": False, "min_new_tokens": 9}
        texts.append(model.generate(ids, attention_mask=padding("right"), **options))
    assert torch.equal(*texts)


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 9),
    reason="torch cannot trace the decorators of transformers 5",
)
def test_a_compiled_model_is_one_graph():
    model = build(gemma)
    ids = tokens()
    torch._dynamo.reset()
    for side in ("none", "left"):
        mask = padding(side)
        expected, wanted = run(model, "eager", ids, mask, use_cache=False)
        model.set_attn_implementation(hook.NAME)
        model.zero_grad()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        logits = compiled(ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
        logits.tanh().square().sum().backward()
        torch.testing.assert_close(logits.detach(), expected, atol=1e-4, rtol=1e-4)
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        torch.testing.assert_close(grads, wanted, atol=1e-3, rtol=1e-3)


def test_dropout_reaches_the_kernel():
    model = build(gpt2).train()
    for block in model.transformer.h:
        block.attn.attn_dropout.p = 0.5
    model.set_attn_implementation(hook.NAME)
    ids = tokens()
    torch.manual_seed(0)
    first = model(ids).logits
    torch.manual_seed(0)
    assert torch.equal(model(ids).logits, first)
    assert not torch.allclose(model(ids).logits, first)


def test_weights_are_refused():
    q = torch.zeros(1, 2, 3, 8)
    with pytest.raises(UnsupportedProblemError, match="output_attentions must be False"):
        hook.attention_forward(torch.nn.Identity(), q, q, q, None, output_attentions=True)
    with pytest.raises(UnsupportedProblemError, match="cache must be None"):
        hook.attention_forward(torch.nn.Identity(), q, q, q, None, cache=object())


def test_a_model_that_computes_attention_by_itself_is_refused():
    config = transformers.BloomConfig(vocab_size=97, hidden_size=32, n_layer=1, n_head=4)
    model = transformers.BloomForCausalLM._from_config(config, attn_implementation=hook.NAME)
    with pytest.raises(UnsupportedProblemError, match="BloomModel does not take its attention"):
        model(tokens())


@pytest.mark.parametrize("side", ["none", "right"])
def test_a_model_made_for_eager_gets_all_from_its_mask(side):
    """Layers of Splinter do not say that they are not causal."""
    sizes = {name: SMALL[name] for name in SMALL if not name.startswith("num_key")}
    model = transformers.SplinterModel(transformers.SplinterConfig(**sizes)).eval()
    ids, mask, outputs = tokens(), padding(side), []
    for implementation in ("eager", hook.NAME):
        model.config._attn_implementation = implementation
        outputs.append(model(ids, attention_mask=mask).last_hidden_state[mask.bool()])
    torch.testing.assert_close(*outputs, atol=1e-4, rtol=1e-4)


def test_names_that_transformers_keeps_are_refused():
    with pytest.raises(ValueError, match='name must not contain "flash"'):
        hook.register("attn_flash")


def test_unregister_forgets_the_name():
    hook.unregister()
    hook.unregister()
    with pytest.raises((ValueError, KeyError)):
        build(llama).set_attn_implementation(hook.NAME)
