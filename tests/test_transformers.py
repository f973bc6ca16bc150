"""Models nobody here wrote: GPT-2, BERT and a ResNet of transformers, trained before and after pruning to 80 %."""

import copy

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    ResNetConfig,
    ResNetForImageClassification,
)

import sparselottery as sl
from sparselottery.nn import left_dense, masked_modules


def gpt2():
    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    tokens = torch.randint(0, 64, (8, 16))
    return GPT2LMHeadModel(config), dict(input_ids=tokens, labels=tokens)


def bert():
    config = BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        num_labels=3,
    )
    inputs = dict(input_ids=torch.randint(0, 64, (8, 16)), labels=torch.randint(0, 3, (8,)))
    return BertForSequenceClassification(config), inputs


def resnet():
    config = ResNetConfig(
        num_channels=3, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=4
    )
    inputs = dict(pixel_values=torch.randn(8, 3, 32, 32), labels=torch.randint(0, 4, (8,)))
    return ResNetForImageClassification(config), inputs


def train(model, optimizer, inputs, steps):
    model.train()
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        for name, layer in masked_modules(model):
            assert (layer.weight[~layer.mask.to_dense()] == 0).all(), name
    return losses


@pytest.mark.parametrize("make, layers", [(gpt2, 8), (bert, 14), (resnet, 7)])
def test_train_prune_train_save_and_go_back(make, layers, tmp_path):
    torch.manual_seed(0)
    model, inputs = make()
    plain_keys = list(model.state_dict())
    twin = make()[0]
    twin.load_state_dict(model.state_dict())
    initial = copy.deepcopy(model.state_dict())

    sl.sparsify(model)
    assert len(list(masked_modules(model))) == layers
    model.eval(), twin.eval()
    torch.testing.assert_close(model(**inputs).logits, twin(**inputs).logits)

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    before = train(model, optimizer, inputs, 6)
    report = sl.prune(model, sparsity=0.8, optimizer=optimizer)
    assert report.kept == round((1 - 0.8) * report.total) and len(report.layers) == layers
    after = train(model, optimizer, inputs, 12)
    assert before[-1] < before[0] and after[-1] < after[0]

    model.eval()
    want = model(**inputs).logits
    back = sl.densify(copy.deepcopy(model))
    assert list(back.state_dict()) == plain_keys and type(back) is type(twin)
    twin.load_state_dict(back.state_dict())
    torch.testing.assert_close(twin(**inputs).logits, want)
    fresh = sl.sparsify(make()[0]).eval()
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(fresh(**inputs).logits, want)

    path = sl.Ticket.of(model, initial).save(tmp_path / "ticket.safetensors")
    rewound = sl.Ticket.load(path).apply(make()[0])
    for name, layer in masked_modules(rewound):
        assert torch.equal(layer.weight, initial[f"{name}.weight"] * layer.mask.to_dense())
    assert train(rewound, torch.optim.AdamW(rewound.parameters(), lr=3e-3), inputs, 3)

    back.save_pretrained(tmp_path / "hub")
    loaded = type(back).from_pretrained(tmp_path / "hub").eval()
    torch.testing.assert_close(loaded(**inputs).logits, want)


def test_gpt2_keeps_its_tied_output_layer_dense():
    torch.manual_seed(0)
    model, inputs = gpt2()
    assert left_dense(model) == {"lm_head": "shares its weight with transformer.wte (Embedding)"}
    sl.prune(model, density=0.2)
    assert model.lm_head.weight is model.transformer.wte.weight and (model.lm_head.weight != 0).all()
    assert [name for name, _ in masked_modules(model)][:4] == [
        f"transformer.h.0.{part}" for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    model.eval()
    text = model.generate(inputs["input_ids"][:1, :4], max_new_tokens=4, do_sample=False, pad_token_id=0)
    dense = sl.densify(copy.deepcopy(model))
    assert torch.equal(
        text, dense.generate(inputs["input_ids"][:1, :4], max_new_tokens=4, do_sample=False, pad_token_id=0)
    )
