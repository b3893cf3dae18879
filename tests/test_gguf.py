"A GGUF file is converted once: the copy is equal to the last bit, and a bad copy is made again."
import json, threading

import numpy as np
import pytest
import torch

from comam_nb.lm.backbone import load_backbone

gguf = pytest.importorskip("gguf", reason="reading GGUF needs the package `gguf`")


def tiny_gguf(path, seed=0, template=True):
    "A random Llama of two layers in Q4_0, with a byte tokenizer."
    from transformers.convert_slow_tokenizer import bytes_to_unicode
    rng, d = np.random.default_rng(seed), 32
    words = ["<|endoftext|>", *bytes_to_unicode().values(), "th", "the"]
    w = gguf.GGUFWriter(path, "llama")
    w.add_block_count(2); w.add_context_length(64); w.add_embedding_length(d); w.add_feed_forward_length(64)
    w.add_head_count(2); w.add_head_count_kv(2); w.add_layer_norm_rms_eps(1e-5); w.add_vocab_size(len(words))
    w.add_rope_freq_base(10000.0)
    w.add_tokenizer_model("gpt2"); w.add_token_list(words); w.add_token_types([3] + [1] * (len(words) - 1))
    w.add_token_merges(["t h", "th e"]); w.add_bos_token_id(0); w.add_eos_token_id(0)
    if template: w.add_chat_template("{{ messages[0]['content'] }}")
    def put(name, *shape):
        x = rng.standard_normal(shape).astype(np.float32)
        q = gguf.GGMLQuantizationType.Q4_0
        if len(shape) == 2: w.add_tensor(name, gguf.quantize(x, q), raw_dtype=q)
        else: w.add_tensor(name, x)
    put("token_embd.weight", len(words), d); put("output_norm.weight", d)
    for i in range(2):
        put(f"blk.{i}.attn_norm.weight", d); put(f"blk.{i}.ffn_norm.weight", d)
        for n in "qkv": put(f"blk.{i}.attn_{n}.weight", d, d)
        put(f"blk.{i}.attn_output.weight", d, d)
        put(f"blk.{i}.ffn_gate.weight", 64, d)
        put(f"blk.{i}.ffn_up.weight", 64, d)
        put(f"blk.{i}.ffn_down.weight", d, 64)
    w.write_header_to_file(); w.write_kv_data_to_file(); w.write_tensors_to_file(); w.close()


def equal(a, b):
    s, t = a.model.state_dict(), b.model.state_dict()
    return s.keys() == t.keys() and all(torch.equal(s[k], t[k]) for k in s)

def settings(backbone): # saving a model names its class in them
    return {k: v for k, v in backbone.model.config.to_dict().items() if k != "architectures"}

def load(path, **kw):
    return load_backbone(path, adapters=None, device="cpu", verbose=False, **kw)

@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setenv("COMAM_CACHE", str(tmp_path / "cache"))
    tiny_gguf(tmp_path / "tiny.gguf")
    return tmp_path / "tiny.gguf"

@pytest.fixture
def plain(file, monkeypatch):
    "What is loaded without a cache, as it was before there was one."
    with monkeypatch.context() as m:
        m.setenv("COMAM_CACHE", "")
        return load(file)

def copy_of(file):
    [found] = [p for p in (file.parent / "cache" / "gguf").iterdir() if p.is_dir()]
    return found


def test_the_copy_is_equal_to_the_last_bit_and_is_made_once(file, plain, capsys):
    first = load(file)
    assert capsys.readouterr().out == f"{file} is converted, once: a copy is kept in {copy_of(file)}\n"
    again = load(file)
    assert capsys.readouterr().out == ""
    assert equal(plain, first) and equal(plain, again)
    assert settings(plain) == settings(again) and plain.eos_ids == again.eos_ids
    assert plain.model.name_or_path == again.model.name_or_path
    tok, old = again.tokenizer, plain.tokenizer
    assert tok.backend_tokenizer.to_str() == old.backend_tokenizer.to_str()
    assert (tok.chat_template, tok.special_tokens_map) == (old.chat_template, old.special_tokens_map)
    half = load(file, dtype="bfloat16").model.state_dict()
    assert all(torch.equal(half[k], v.to(torch.bfloat16)) for k, v in plain.model.state_dict().items())

def cut(copy): (copy / "model.safetensors").write_bytes((copy / "model.safetensors").read_bytes()[:-100])
def lose(copy): (copy / "tokenizer.json").unlink()
def spoil(copy): (copy / "config.json").write_bytes(b"x" * (copy / "config.json").stat().st_size)
def strange(copy): (copy / "made_from.json").write_text("[1]")
def nameless(copy): (copy / "made_from.json").unlink()
def older(copy):
    made = json.loads((copy / "made_from.json").read_text())
    (copy / "made_from.json").write_text(json.dumps(made | {"conversion": 0}))

def test_a_bad_copy_is_made_again_and_it_is_said(file, plain, capsys):
    load(file)
    for harm in (cut, lose, spoil, strange, nameless, older):
        harm(copy_of(file))
        capsys.readouterr()
        assert equal(load(file), plain), harm
        said = capsys.readouterr().out.splitlines()
        assert len(said) == 2 and said[0].endswith("it is made again") and "is converted, once" in said[1], (harm, said)
        load(file)
        assert capsys.readouterr().out == "", harm

def test_another_file_of_the_same_name_is_another_copy(file, plain, capsys):
    load(file)
    tiny_gguf(file, seed=1)
    assert not equal(load(file), plain) and "has changed: it is made again" in capsys.readouterr().out

def test_where_nothing_can_be_written_it_is_loaded_all_the_same(file, plain, capsys, monkeypatch):
    (file.parent / "a_file").touch()
    monkeypatch.setenv("COMAM_CACHE", str(file.parent / "a_file"))
    assert equal(load(file), plain) and equal(load(file), plain)
    [said] = capsys.readouterr().out.splitlines()
    assert "no copy can be kept" in said and "COMAM_CACHE" in said

def test_a_full_disk_loses_nothing(file, plain, capsys, monkeypatch):
    def full(self, folder): raise OSError(28, "No space left on device")
    monkeypatch.setattr(type(plain.model), "save_pretrained", full)
    assert equal(load(file), plain) and "no copy" in capsys.readouterr().out
    assert not [p for p in (file.parent / "cache" / "gguf").iterdir() if p.is_dir()]

def test_two_that_load_at_once_convert_once(file, plain, capsys):
    place, got = file.parent / "cache" / "gguf", []
    threads = [threading.Thread(target=lambda: got.append(load(file))) for _ in range(2)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert len(got) == 2 and all(equal(b, plain) for b in got)
    assert capsys.readouterr().out.count("is converted, once") == 1
    assert len([p for p in place.iterdir() if p.is_dir()]) == 1

def test_what_a_killed_process_left_is_cleared_away(file, plain):
    load(file)
    copy = copy_of(file)
    left = copy.with_name(f".{copy.name}-dead")
    left.mkdir()
    lose(copy)
    assert equal(load(file), plain) and not left.exists()

@pytest.mark.slow
def test_a_real_model_comes_back_as_it_was(smollm2, tmp_path, monkeypatch):
    monkeypatch.setenv("COMAM_CACHE", "")
    plain = load(smollm2)
    monkeypatch.setenv("COMAM_CACHE", str(tmp_path))
    load(smollm2)
    again = load(smollm2)
    assert equal(plain, again) and again.tokenizer("Hello, tea?").input_ids == plain.tokenizer("Hello, tea?").input_ids
    assert settings(again) == settings(plain)
