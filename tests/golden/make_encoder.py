"""Make encoder.json: what transformers computes for encoders and encoder-decoders, in fp32.

    python tests/golden/make_encoder.py [directory of the fixture minilm-l6]

Needs the extra `parity`. Each document is run alone and without padding.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent / "helpers")]
from families import BODIES, HEADS, PAIRED, headed, write  # noqa: E402
from reference import F, torch, transformers  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402

import sftjax  # noqa: E402

LENGTHS = (9, 24, 17, 5)
LABELS = (0, 2, 1, 2)
STOP = 47  # a token that an encoder-decoder of families.py writes now and then
WIDTH = 8  # stored elements of a vector


def short(x):
    return [float(f"{v:.7g}") for v in np.asarray(x).ravel().tolist()]


def documents(vocab, lengths=LENGTHS):
    rng = np.random.default_rng(4)
    return [rng.integers(1, vocab, n).tolist() for n in lengths]


def given(document):
    types = [int(i >= len(document) // 2) for i in range(len(document))]
    return dict(input_ids=torch.tensor([document]), token_type_ids=torch.tensor([types]))


def small(directory) -> dict:
    """The random model of families.py: logits, mean loss, norms of the gradients by tensor."""
    path = write("bert-classes", directory)
    model = transformers.BertForSequenceClassification.from_pretrained(path).eval()
    docs = documents(64)
    logits = torch.cat([model(**given(d)).logits for d in docs])
    loss = F.cross_entropy(logits, torch.tensor(LABELS))
    loss.backward()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.grad)
    model.save_pretrained(path)
    norms = load_file(path / "model.safetensors")
    norms = {k: float(f"{np.linalg.norm(norms[k]):.6g}") for k in sorted(norms)}
    logits = [short(x) for x in logits.detach()]
    return {"documents": docs, "logits": logits, "loss": short(loss.item()), "gradients": norms}


def real(path) -> dict:
    """The first elements of each document's last hidden state and pooled vector."""
    model, docs = transformers.BertModel.from_pretrained(path).eval(), documents(30522, (12, 60))
    with torch.no_grad():
        outs = [model(**given(d)) for d in docs]
    hidden = [short(o.last_hidden_state[0, -1, :WIDTH]) for o in outs]
    pooled = [short(o.pooler_output[0, :WIDTH]) for o in outs]
    return {"documents": docs, "hidden": hidden, "pooled": pooled}


AUTO = {
    "document": transformers.AutoModelForSequenceClassification,
    "token": transformers.AutoModelForTokenClassification,
    "span": transformers.AutoModelForQuestionAnswering,
    "vocabulary": transformers.AutoModelForMaskedLM,
}


def heads(directory) -> dict:
    """The last token's logits of each encoder and head; of a document, the first's."""
    made, document = {}, [int(t) for t in np.arange(17) * 7 % 61 + 2]
    for name in BODIES:
        for head in HEADS:
            where = directory / f"{name}-{head}"
            sftjax.save_pretrained(where, *headed(name, head, where / "in"))
            model = AUTO[head].from_pretrained(where).eval()
            with torch.no_grad():
                out = model(input_ids=torch.tensor([document]))
            if head == "span":
                logits = torch.stack([out.start_logits, out.end_logits], -1)[0, -1]
            else:
                logits = out.logits[0] if head == "document" else out.logits[0, -1]
            made[f"{name} {head}"] = short(logits[:WIDTH])
    return {"document": document, "logits": made}


def pairs(directory) -> dict:
    """Of each encoder-decoder: the last logits of a target, and what greedy and 3 beams write."""
    made, document = {}, [int(t) for t in np.arange(17) * 7 % 61 + 3]
    source, target = document[:12], document[12:]
    for name in PAIRED:
        path = write(name, directory / name)
        model = transformers.AutoModelForSeq2SeqLM.from_pretrained(path).eval()
        start, texts = model.config.decoder_start_token_id, {}
        for beams in (1, 3):
            how = transformers.GenerationConfig(
                max_new_tokens=9, num_beams=beams, eos_token_id=STOP, decoder_start_token_id=start,
                pad_token_id=model.config.pad_token_id, early_stopping=False,
            )  # fmt: skip
            found = model.generate(torch.tensor([source]), generation_config=how)
            texts[beams] = [t for t in found[0, 1:].tolist() if t != STOP]
        with torch.no_grad():
            shown = torch.tensor([[start, *target[:-1]]])
            out = model(input_ids=torch.tensor([source]), decoder_input_ids=shown)
        made[name] = {"logits": short(out.logits[0, -1, :WIDTH]), "texts": texts}
    return {"source": source, "target": target, "models": made}


def main(minilm):
    made = {"torch": torch.__version__, "transformers": transformers.__version__}
    with tempfile.TemporaryDirectory() as directory:
        out = {"small": small(Path(directory)), "minilm-l6": real(minilm)}
        out["heads"] = heads(Path(directory))
        out["pairs"] = pairs(Path(directory))
    lines = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in ({"made_with": made} | out).items()]
    (HERE / "encoder.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else HERE.parents[2] / "shared/fixtures/minilm-l6")
