"""The share of answers whose end, after any reasoning, is the reference's."""


def final(references, predictions):
    """{"final": share} of texts; of each only what follows the last </think> counts."""
    end = lambda text: text.rpartition("</think>")[2].split()  # noqa: E731
    right = [end(a) == end(b) for a, b in zip(references, predictions, strict=True)]
    return {"final": sum(right) / len(right)}
