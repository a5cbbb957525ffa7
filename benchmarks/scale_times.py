"""A model of time on H100s, from counts of bytes and operations: estimates, not measurements.

The time of an update is the sum of that of matrix products, of memory and of links, with nothing
overlapped; a refresh adds its products and decompositions.
"""

# Per second and GPU. Measured on one H100 SXM, 80 GB, with JAX 0.11.2: products of stacks of blocks
# of 2048 and 2752, at the default precision, which for float32 is TF32; on the same blocks batched
# QR (2.1 and 3.4) and eigendecompositions (2.6 and 5.1), in units of the operations that
# `scale_hlo` counts; a copy of 4 GiB.
PRODUCTS = {"f32": 320e12, "bf16": 730e12, "f64": 61e12}
DECOMPOSITIONS = {"geqrf": 2.8e12, "orgqr": 2.8e12, "syevd": 3.6e12}
MEMORY = 3.0e12  # bytes, read or written
# How often elementwise arithmetic goes over all blocks, or all parameters. Fitted, one number for
# all, to usual steps of SOAP, its variants and Shampoo on that GPU; AdamW's to AdamW.
PASSES, PASSES_ADAMW = 40, 7
# Assumed, not measured: bytes that come in from other GPUs.
LINKS = {"NVLink": 300e9, "InfiniBand": 40e9}

# A training step: 6·N·tokens operations in bfloat16.
TOKENS = 4e6
PEAK, UTILISATION = 989e12, 0.4

# Steps from one refresh to the next: defaults, and of kron_psgd what comes in the long run.
INTERVALS = {"kron_psgd": 33, "soap": 10, "kl_soap": 10, "kl_shampoo": 10, "shampoo": 10}


def counts(figures):
    """Of one device: what it gets from others, operations usually, and what is added when due."""
    done = figures["operations"]
    moved = [x for x in done if "-" in x["kind"]]
    work = [x for x in done if "-" not in x["kind"]]
    if any(x["kind"] == "geqrf" for x in work):
        # The first bases come from an eigendecomposition, later ones from QR.
        first = {x["loop"] for x in work if x["kind"] == "syevd"}
        work = [x for x in work if x["loop"] not in first]
    usual = [x for x in work if x["when"] != "due"]
    due = [x for x in work if x["when"] != "usually"]
    kinds = sorted({x["kind"] for x in moved})
    return {
        "collectives": {k: sum(x["times"] for x in moved if x["kind"] == k) for k in kinds},
        "received": sum(x["total"] for x in moved),
        # What all devices get in one collective, in units of all gradients.
        "largest": max((x["total"] for x in moved), default=0)
        * figures["devices"]
        / figures["all_gradients"],
        "usual_flop": _flop(usual),
        "due_flop": _flop(due) - _flop(usual),
        "usual_products_s": _seconds(usual),
        "due_s": _seconds(due) - _seconds(usual),
    }


def _flop(work):
    return sum(x["total"] for x in work)


def _seconds(work):
    """Of products and decompositions."""
    return sum(x["total"] / (DECOMPOSITIONS.get(x["kind"]) or PRODUCTS[x["dtype"]]) for x in work)


def times(name, figures):
    """Seconds: of a usual step without links, what a refresh adds, links, and all on average."""
    found = counts(figures)
    passes = PASSES_ADAMW if name == "adamw" else PASSES
    memory = (2 * figures["state"] + passes * figures["block_bytes"]) / MEMORY
    usual = found["usual_products_s"] + memory
    links = {link: found["received"] / rate for link, rate in LINKS.items()}
    average = usual + found["due_s"] / INTERVALS.get(name, 1)
    operations = 6 * figures["parameters"] * TOKENS
    step = operations / (figures["devices"] * PEAK * UTILISATION)
    return {
        "usual_s": usual,
        "due_s": found["due_s"],
        "links_s": links,
        "step_s": step,
        "shares": {link: (average + extra) / step for link, extra in links.items()},
    }
