"""Write a made-up table of card payments of which 2% are fraud, as JSON lines.

    python experiments/fraud/make_data.py [runs/fraud_data]

train.jsonl has 20,000 rows, validation.jsonl 5,000 and test.jsonl 10,000, drawn alike and each from
a seed of its own. Whether a payment is fraud is drawn with a chance of its own, a logistic function
of effects that are mostly no linear ones: how odd an amount is for its kind of shop, nights for
online shops alone, distances for young accounts, ages in a U, a country with one kind of shop,
several payments within an hour. What a model cannot know is left to the draw; main() says what the
chances themselves score, which is about the most that any model can. No row has a missing value.

shuffled_0.jsonl to shuffled_2.jsonl are the control: the training rows with their labels in
another order. text_train.jsonl has the first 2,000 training rows, text_test.jsonl the first 2,000
test rows, for config_text.py.
"""

import json
import sys
from pathlib import Path

import numpy as np

ROWS = {"train": 20_000, "validation": 5_000, "test": 10_000}
TEXT_ROWS, SHARE, SHUFFLES = 2_000, 0.02, 3
COUNTRIES = ("DE", "FR", "GB", "ES", "IT", "NL", "US", "BR")
SHOPS = ("grocery", "fuel", "travel", "electronics", "fashion", "gaming", "jewellery")
CHANNELS = ("chip", "contactless", "online", "phone")
USUAL = dict(zip(SHOPS, (3.4, 3.9, 5.6, 5.2, 4.2, 3.0, 5.5), strict=True))  # log of amounts


def table(n, seed):
    """({column: values [n]}, the logit of each row's fraud but for a constant [n])."""
    rng = np.random.default_rng(seed)
    pick = lambda names, p: rng.choice(names, n, p=np.array(p) / sum(p))  # noqa: E731
    country = pick(COUNTRIES, (30, 15, 12, 10, 10, 8, 10, 5))
    shop = pick(SHOPS, (30, 18, 8, 10, 16, 12, 6))
    channel = pick(CHANNELS, (35, 30, 30, 5))
    odd = rng.normal(size=n)
    amount = np.exp(np.vectorize(USUAL.get)(shop) + 0.6 * odd)
    hour = rng.integers(0, 24, n)
    age = rng.integers(18, 90, n)
    account = rng.gamma(1.5, 400.0, n)  # days
    distance = rng.exponential(1.0, n) ** 2 * 40.0  # km from the payment before
    recent = rng.poisson(0.5, n)  # payments in the hour before
    night, online = (hour < 6) | (hour == 23), channel == "online"
    logit = 2.2 * np.maximum(odd - 0.8, 0) + 1.2 * np.maximum(-odd - 1.5, 0)
    logit += 3.0 * (night & online) - 0.6 * (night & ~online)
    logit += 1.1 * (account < 120) * np.log1p(distance / 10)
    logit += 1.2 * ((age - 52) / 30.0) ** 2
    logit += 3.5 * ((country == "BR") & (shop == "electronics"))
    logit += 2.5 * ((country == "US") & (shop == "gaming") & online)
    logit += 1.0 * np.minimum(recent, 4) * (channel != "chip") - 0.8 * (channel == "chip")
    columns = dict(
        amount=amount.round(2), hour=hour, age=age, account_days=account.round(),
        distance_km=distance.round(1), payments_last_hour=recent,
        country=country, shop=shop, channel=channel,
    )  # fmt: skip
    return columns, logit


def constant(logit):
    """What makes the mean chance of these rows SHARE."""
    low, high = -30.0, 10.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if chance(logit + middle).mean() < SHARE else (low, middle)
    return low


def chance(logit):
    return 1 / (1 + np.exp(-logit))


def as_text(row):
    """A row as a sentence of its columns."""
    return (
        f"amount {row['amount']:.2f}, shop {row['shop']}, channel {row['channel']}, country"
        f" {row['country']}, hour {row['hour']}, age {row['age']}, account of"
        f" {row['account_days']:.0f} days, {row['distance_km']:.1f} km from the last payment,"
        f" {row['payments_last_hour']} payments in the last hour"
    )


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main(out="runs/fraud_data", rows=ROWS):
    """{set: {"rows", "fraud", "auroc" of the chances that the labels were drawn with}}."""
    from sklearn.metrics import roc_auc_score

    out, found, base = Path(out), {}, constant(table(200_000, 99)[1])
    out.mkdir(parents=True, exist_ok=True)
    for seed, (name, n) in enumerate(rows.items()):
        columns, logit = table(n, seed)
        p, rng = chance(logit + base), np.random.default_rng([seed, 1])
        fraud = (rng.uniform(size=n) < p).astype(int)
        columns["fraud"] = fraud
        lists = {k: v.tolist() for k, v in columns.items()}
        made = [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]
        write(out / f"{name}.jsonl", made)
        few = [{"text": as_text(r), "label": r["fraud"]} for r in made[:TEXT_ROWS]]
        if name == "train":
            for i in range(SHUFFLES):
                order = rng.permutation(n)
                other = [r | {"fraud": int(fraud[j])} for r, j in zip(made, order, strict=True)]
                write(out / f"shuffled_{i}.jsonl", other)
        if name != "validation":
            write(out / f"text_{name}.jsonl", few)
        auroc = float(roc_auc_score(fraud, p)) if 0 < fraud.sum() < n else float("nan")
        found[name] = dict(rows=n, fraud=int(fraud.sum()), auroc=auroc)
    for name, facts in found.items():
        print(f"{name}: {facts['rows']} rows, {facts['fraud']} fraud; AUROC of the chances"
              f" {facts['auroc']:.3f}")  # fmt: skip
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
