"""The same numbers and texts as lm-eval's own model on `transformers`, whatever tokenizers add."""

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, pre_tokenizers, processors, trainers

from gptjax.evals.score import encode_pair
from gptjax.evals.subject import Subject
from gptjax.training.pretrained import load_model

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXT = "The cat sat on the mat, and the dog went to the goodness of the good old house. " * 5
# name: (what the tokenizer's config says of it, whether it puts its BOS before a text)
TOKENIZERS = {
  "no BOS": ({"eos_token": "<|endoftext|>"}, False),
  "BOS is EOS": ({"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}, False),
  "another BOS": ({"bos_token": "<|im_start|>", "eos_token": "<|endoftext|>"}, False),
  "BOS added": ({"bos_token": "<|im_start|>", "eos_token": "<|endoftext|>"}, True),
}
PAIRS = [
  ("", "The cat"),
  ("", "<|im_start|>The cat"),
  ("The cat", " sat"),
  ("The cat ", "sat on"),
  ("The cat\n", " sat"),
  ("the good", "ness of"),
  ("<|im_start|>user\nThe cat<|im_end|>\n<|im_start|>assistant\n", "sat"),
  ("<|endoftext|>The cat", " sat"),
]
TEXTS = ["The cat sat.", "<|im_start|>The cat", TEXT[:200], "a"]
PROMPTS = ["The cat", "<|im_start|>user\nThe cat", "the dog went to the"]


@pytest.fixture(scope="module", params=TOKENIZERS)
def both(request, tmp_path_factory):
  """(our model in lm-eval, theirs) of the same folder, with random weights."""
  with pytest.MonkeyPatch.context() as patch:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
      patch.setenv(name, "1")
    patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("cache")))
    import torch
    import transformers
    from lm_eval.models.huggingface import HFLM

    from gptjax.evals.harness import HarnessModel

    settings, adds_bos = TOKENIZERS[request.param]
    folder = tmp_path_factory.mktemp("model")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
      [TEXT],
      trainers.BpeTrainer(vocab_size=320, special_tokens=SPECIALS, initial_alphabet=alphabet),
    )
    if adds_bos:
      bos = settings["bos_token"]
      bpe.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, bpe.token_to_id(bos))]
      )
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, **settings)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
      transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=40,
        initializer_range=0.3,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
      )
    ).eval()
    model.save_pretrained(folder)
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, device="cpu")
    ours = HarnessModel(Subject(*load_model(f"hf:{folder}"), batch_size=2))
    yield ours, theirs


def requests(kind, arguments):
  from lm_eval.api.instance import Instance

  return [Instance(kind, {}, one, index) for index, one in enumerate(arguments)]


def test_likelihoods(both):
  asked = requests("loglikelihood", PAIRS)
  ours, theirs = (np.array(model.loglikelihood(asked)) for model in both)
  np.testing.assert_allclose(ours[:, 0], theirs[:, 0], atol=1e-3)
  assert ours[:, 1].tolist() == theirs[:, 1].tolist()


def test_rolling_likelihoods(both):
  asked = requests("loglikelihood_rolling", [(text,) for text in TEXTS])
  ours, theirs = (model.loglikelihood_rolling(asked) for model in both)
  np.testing.assert_allclose(ours, theirs, atol=1e-3)


def test_texts(both):
  options = {"until": ["\n\n"], "max_gen_toks": 8, "do_sample": False}
  asked = requests("generate_until", [(prompt, dict(options)) for prompt in PROMPTS])
  ours, theirs = (model.generate_until(asked) for model in both)
  assert ours == theirs
  assert any(ours)


def test_tasks_of_ours_read_a_text_as_the_tokenizer_makes_it(both):
  ours, theirs = both
  tokenizer, subject = ours.subject.tokenizer, ours.subject
  for text in ("The cat", "the dog went"):
    expected = theirs.tokenizer(text).input_ids
    assert tokenizer.encode_prompt(text) == expected
    before, after = encode_pair(tokenizer, text, " sat")
    assert [*before, *after] == theirs.tokenizer(f"{text} sat").input_ids
  assert tokenizer.encode_prompt("") == [theirs.prefix_token_id]
  assert encode_pair(tokenizer, "", "The")[0] == [theirs.prefix_token_id]
  (found,) = subject.score_documents(["The cat sat."])
  tokens = theirs.tokenizer("The cat sat.", add_special_tokens=False).input_ids
  ((expected, _),) = theirs._loglikelihood_tokens([(None, [theirs.prefix_token_id], tokens)])
  assert found.log_likelihood == pytest.approx(expected, abs=1e-3)
