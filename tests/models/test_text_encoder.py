from pathlib import Path

import pytest
import torch

from ldm.checkpoints.run_checkpoint import learned_tokens
from ldm.errors import UserError
from ldm.files import make_folder
from ldm.models.learned_tokens import find_words
from ldm.models.text_encoder import CLIPTextEncoder
from tests.checkpoints import sd_v1

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
BOS, EOS = 188, 189  # of the tiny tokenizer: one token per character


def build(tokenizer: Path | str, **params) -> CLIPTextEncoder:
    torch.manual_seed(0)
    special = {"vocab_size": 190, "bos_token_id": BOS, "eos_token_id": EOS}
    return CLIPTextEncoder(**{**SIZES, **special, "max_length": 12, "tokenizer": str(tokenizer), **params})


def test_sd1_names_and_counts():
    with torch.device("meta"):
        state = CLIPTextEncoder().state_dict()
    assert set(state) == {f"transformer.text_model.{name}" for name in sd_v1.text_encoder()}
    assert (len(state), sum(tensor.numel() for tensor in state.values())) == (196, 123_060_480)


def test_tokenize(tiny_tokenizer):
    encoder = build(tiny_tokenizer)
    ids = encoder.tokenize(["a Cat", ""])
    assert ids.dtype == torch.int64 and ids.shape == (2, 12)
    vocabulary = encoder.tokenizer.get_vocab()
    tokens = [vocabulary[token] for token in ("a</w>", "c", "a", "t</w>")]
    assert ids[0].tolist() == [BOS, *tokens, *[EOS] * 7]
    assert ids[1].tolist() == [BOS, *[EOS] * 11]


def test_padding_is_its_own_token_where_given(tiny_tokenizer):
    assert build(tiny_tokenizer, pad_token_id=0).tokenize([""]).tolist() == [[BOS, EOS, *[0] * 10]]


def test_overlong_prompts_keep_their_beginning_and_eos(tiny_tokenizer):
    encoder = build(tiny_tokenizer)  # 10 characters fit
    fits, cut = "abcd efghij", "abcd efghij K, lm"
    ids = encoder.tokenize([fits, cut])
    assert ids[0, -1] == ids[1, -1] == EOS and (ids[:, 1:-1] != EOS).all()
    assert torch.equal(ids[0, 1:10], ids[1, 1:10])
    assert encoder.truncated_tail(fits) is None
    assert encoder.truncated_tail("") is None
    assert encoder.truncated_tail(cut) == "K, lm"
    assert encoder.truncated_tail("ééééé  ééééé") is not None  # two bytes each, so ten do not fit


@torch.no_grad()
def test_a_token_sees_only_those_before_it(tiny_tokenizer):
    encoder = build(tiny_tokenizer)
    ids = encoder.tokenize(["abcdefgh"])
    other = ids.clone()
    other[0, 5] = 7
    difference = (encoder(other) - encoder(ids)).abs().amax(dim=(0, 2))
    assert not difference[:5].any()
    assert (difference[5:] > 1e-4).all()


def test_attention_is_sdpa():
    """Plain attention would keep the whole table of weights, and would not know that it is causal."""
    text_model = build("absent").transformer["text_model"]
    assert text_model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("layer", ["last", "penultimate"])
def test_gradient_checkpointing_changes_nothing(layer):
    ids = torch.arange(24).reshape(2, 12)
    results = []
    for use_checkpoint in (False, True):
        encoder = build("absent", layer=layer, use_checkpoint=use_checkpoint)
        context = encoder(ids)
        context.square().sum().backward()
        results.append([context, *(p.grad for p in encoder.parameters() if p.grad is not None)])
    plain, checkpointed = results
    assert len(plain) == len(checkpointed) == 1 + 36 - 16 * (layer == "penultimate")
    assert all(torch.equal(a, b) for a, b in zip(plain, checkpointed, strict=True))


@torch.no_grad()
def test_the_network_needs_no_vocabulary():
    assert build("absent")(torch.zeros(1, 12, dtype=torch.int64)).shape == (1, 12, 32)


def test_tokenizer_beside_the_library_or_in_the_current_folder(tiny_tokenizer, tmp_path, monkeypatch):
    expected = build(tiny_tokenizer).tokenize(["a cat"])
    (tmp_path / "ldm").symlink_to(tiny_tokenizer.parent)
    monkeypatch.setattr("ldm.shipped.PACKAGE", tmp_path / "ldm")
    monkeypatch.chdir(make_folder(tmp_path / "elsewhere"))
    assert torch.equal(build(f"ldm/{tiny_tokenizer.name}").tokenize(["a cat"]), expected)
    monkeypatch.chdir(tiny_tokenizer.parent)
    assert torch.equal(build(tiny_tokenizer.name).tokenize(["a cat"]), expected)


def test_a_tokenizer_that_is_nowhere_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"neither a folder.*\(nobody/nothing\).*hf download"):
        build("nobody/nothing").tokenize(["a cat"])


def test_a_folder_without_vocabulary_is_named(tmp_path):
    with pytest.raises(UserError, match=f"lacks vocab.json or merges.txt.*{tmp_path.name}"):
        build(tmp_path).tokenize(["a cat"])


@pytest.mark.parametrize("params", [{"vocab_size": 189}, {"eos_token_id": 1}, {"bos_token_id": 1}])
def test_a_tokenizer_of_another_network_is_refused(tiny_tokenizer, params):
    with pytest.raises(UserError, match="the text encoder expects"):
        build(tiny_tokenizer, **params).tokenize(["a cat"])


WORDS = [  # learned words, a prompt, the words that it holds
    (["art"], "art, an Art and ART", ["art", "Art", "ART"]),
    (["art"], "the artist's smart part", []),
    (["art"], 'art-deco (art) art\'s "art"', ["art"] * 4),
    (["<my-dog>"], "a <my-dog>, <MY-DOG>s and x<my-dog>", ["<my-dog>", "<MY-DOG>", "<my-dog>"]),
    (["my", "my dog", "dog"], "my dog is my own dog", ["my dog", "my", "dog"]),
    (["v1.5"], "v1.5 v125 v1.55", ["v1.5"]),
    (["été"], "un ÉTÉ, étés", ["ÉTÉ"]),
    ([], "a dog", []),
]


@pytest.mark.parametrize(("words", "prompt", "found"), WORDS)
@pytest.mark.parametrize("count", [1, 3])
def test_learned_words_are_whole_words_in_any_case(tiny_tokenizer, words, prompt, found, count):
    """However many vectors they have; the text around them stays as it is."""
    encoder = build(tiny_tokenizer, max_length=77)
    for word in words:
        encoder.add_token(word, torch.randn(count, 32))
    ids = encoder._tokenize(prompt)
    matches = find_words(prompt, words)
    assert [prompt[match.start : match.end] for match in matches] == found
    lower = [word.lower() for word in words]
    expected = [190 + count * lower.index(word.lower()) + k for word in found for k in range(count)]
    assert [number for number in ids.ids if number >= 190] == expected
    plain = build(tiny_tokenizer, max_length=77)
    starts, ends = [0, *(match.end for match in matches)], [*(match.start for match in matches), None]
    rest = [prompt[start:end] for start, end in zip(starts, ends, strict=True)]
    assert [n for n in ids.ids if n < 190] == [n for piece in rest for n in plain._tokenize(piece).ids]


@pytest.mark.parametrize(
    "word, prompt", [("<kiz>", "a <k\u0131z>"), ("sks", "a \u017fks"), ("K", "\u212a b")]
)
def test_letters_that_only_a_search_without_case_takes_for_others(tiny_tokenizer, word, prompt):
    """A dotless i, a long s, the Kelvin sign: their lower case is another letter."""
    encoder = build(tiny_tokenizer, max_length=77)
    encoder.add_token(word, torch.randn(2, 32), new=False)
    assert [number for number in encoder._tokenize(prompt).ids if number >= 190] == [190, 191]


def test_embeddings_are_float32_beside_lower_weights(tiny_tokenizer):
    """Else a word would learn in bfloat16, and lose most of its updates."""
    encoder = build(tiny_tokenizer).to(torch.bfloat16)
    encoder.add_token("<my-dog>", torch.randn(2, 32))
    vectors = encoder.learned_tokens["<my-dog>"]
    assert vectors.dtype == torch.float32
    context = encoder(encoder.tokenize(["ab <my-dog> c"]))
    assert context.dtype == torch.bfloat16
    context.float().sum().backward()
    assert vectors.grad.dtype == torch.float32 and vectors.grad.abs().sum() > 0


def test_what_is_cut_off_is_told_of_the_prompt_itself(tiny_tokenizer):
    """Not of one in which words of several vectors are written out."""
    encoder = build(tiny_tokenizer)  # 10 tokens fit
    encoder.add_token("<my-dog>", torch.randn(4, 32))
    assert encoder.truncated_tail("ab <my-dog> cdef") is None
    assert encoder.truncated_tail("ab <my-dog> cdef GH i") == "GH i"
    assert encoder.truncated_tail("abcdefgh <my-dog> i") == "<my-dog> i"


@pytest.mark.parametrize("word", ["", " ", " a", "<a> ", "a", "b</w>"])
def test_what_is_no_new_word(tiny_tokenizer, word):
    """A file's word may be one of the vocabulary, as in other tools; a word that is to be learned is new."""
    encoder = build(tiny_tokenizer)
    with pytest.raises(UserError, match="is no word|known already"):
        encoder.add_token(word, torch.randn(1, 32))
    if word in ("a", "b</w>"):
        encoder.add_token(word, torch.randn(1, 32), new=False)
        assert encoder.tokenize([word])[0, 1] == encoder.vocab_size


@pytest.mark.parametrize("word", ["keys", "training", "a.b", "%2E.%", "forward", "é è"])
def test_any_word_is_kept_under_its_name(tiny_tokenizer, word):
    """Also one that a module has an attribute of, or that has a dot; a checkpoint gives it back."""
    encoder, vectors = build(tiny_tokenizer), torch.randn(2, 32)
    encoder.add_token(word, vectors)
    assert torch.equal(encoder.learned_tokens[word], vectors)
    state = {f"cond_stage_model.{name}": tensor for name, tensor in encoder.state_dict().items()}
    assert list(learned_tokens(state)) == [word]
    with pytest.raises(UserError, match="known already"):
        encoder.add_token(word.upper(), vectors)
