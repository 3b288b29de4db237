"""The model card of an export: README.md, with the numbers of the run that made it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Template

from sftjax.files import write_atomic
from sftjax.reports.run import table, values
from sftjax.terminal import printable
from sftjax.training.data import Feed

# What the hub calls the tasks of ours; others have no row.
PIPELINES = {"causal_lm": "text-generation", "classification": "text-classification"}


def write_card(export: Path, feed: Feed, result: Mapping[str, Any]) -> None:
    """Write README.md into an exported model's directory; result: as train returns it."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    config, after, name = feed.config, result["after"], export.parent.name
    pipeline = PIPELINES.get(config.task)
    found = [
        EvalResult(
            task_type=pipeline or "other",
            dataset_type=set_name,  # by which results are kept apart
            dataset_name=set_name,
            metric_type=metric,
            metric_value=value,
        )
        for key, value in values(after).items()
        for set_name, _, metric in [key.partition("/")]
    ]
    drawn = config.model.init == "random"
    base = "" if drawn or Path(config.model.path).exists() else config.model.path
    data = ModelCardData(
        base_model=base or None,
        library_name="transformers" if pipeline else None,
        pipeline_tag=pipeline,
        tags=["sftjax", "sft"],
        model_name=name,
        eval_results=found or None,
    )
    d = config.data
    sources = d.train or ", ".join(str(source["path"]) for source in d.sources)
    file = Path(__file__).with_name("templates") / "card.md.jinja"
    text = Template(file.read_text(encoding="utf-8")).render(
        data=data, name=name, config=config, drawn=drawn, sources=sources, result=result,
        table=table(result["before"], after), sets=", ".join(feed.sets | feed.tests) or "none",
    )  # fmt: skip
    write_atomic(export / "README.md", str(ModelCard(printable(text))))
