"""Build base_model/: a character-level tokenizer with a chat template, and the model's config.

    python experiments/quickstart/make_tokenizer.py

One token per character of ASCII text, so decode(encode(text)) == text; any other character becomes
one <unk>. Nothing is added on encoding: the chat template writes <bos>.
"""

import argparse
import json
import string
from pathlib import Path

from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

BASE_MODEL = Path(__file__).parent / "base_model"
CONTEXT = 512  # tokens

SPECIAL = "<pad> <bos> <eos> <unk> <|system|> <|user|> <|assistant|> <|end|>".split()
RESERVED = [f"<|reserved_{i}|>" for i in range(4)]  # fills the vocabulary to a multiple of 8
VOCABULARY = [*SPECIAL, *string.printable, *RESERVED]

# A turn is <|role|>content<|end|> and a newline. Whatever breaks the order stops here: a template
# that lets it pass trains on conversations nobody will ever have with the model.
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- set ns = namespace(next='user') -%}
{%- for message in messages -%}
    {%- if message.role not in ['system', 'user', 'assistant'] -%}
        {{- raise_exception('unknown role ' ~ message.role) -}}
    {%- elif message.content is not string -%}
        {{- raise_exception('the content of a turn must be a string') -}}
    {%- elif message.role == 'system' -%}
        {%- if not loop.first -%}
            {{- raise_exception('a system turn comes first or not at all') -}}
        {%- endif -%}
    {%- elif message.role != ns.next -%}
        {{- raise_exception('expected a turn of ' ~ ns.next ~ ', got ' ~ message.role) -}}
    {%- else -%}
        {%- set ns.next = 'user' if message.role == 'assistant' else 'assistant' -%}
    {%- endif -%}
    {{- '<|' ~ message.role ~ '|>' ~ message.content ~ '<|end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|assistant|>' -}}
{%- endif -%}
"""


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {token: i for i, token in enumerate(VOCABULARY)}
    # BPE without merges and without a pre-tokenizer: each character is a token, blanks included
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()  # the default joins tokens with blanks
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        # The end of a turn, not of a document: programs that know one stop token read this one.
        # generation_config.json lists both.
        eos_token="<|end|>",
        unk_token="<unk>",
        additional_special_tokens=["<eos>", "<|system|>", "<|user|>", "<|assistant|>", *RESERVED],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
    )


def model_config() -> dict:
    """752,768 parameters: 3.0 MB of fp32 weights."""
    token = VOCABULARY.index
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(VOCABULARY),
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": CONTEXT,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "torch_dtype": "float32",
        "bos_token_id": token("<bos>"),
        "eos_token_id": [token("<|end|>"), token("<eos>")],
        "pad_token_id": token("<pad>"),
    }


def generation_config() -> dict:
    config = model_config()
    stop = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {**stop, "do_sample": False, "max_new_tokens": 64}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=BASE_MODEL, help="directory to write to")
    args = parser.parse_args()
    make_tokenizer().save_pretrained(args.out)
    # transformers 5 writes names that 4 cannot read; these two load in both
    saved = json.loads((args.out / "tokenizer_config.json").read_text(encoding="utf-8"))
    saved["tokenizer_class"] = "PreTrainedTokenizerFast"
    saved["additional_special_tokens"] = saved.pop("extra_special_tokens")
    for name, content in (
        ("tokenizer_config.json", saved),
        ("config.json", model_config()),
        ("generation_config.json", generation_config()),
    ):
        (args.out / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(f"{args.out}: {len(VOCABULARY)} tokens")


if __name__ == "__main__":
    main()
