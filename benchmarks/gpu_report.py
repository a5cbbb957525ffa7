"""From the messages of `gpu.py`'s measurements: lines, and tables in markdown."""

import gpu_rows

TARGET = 1.15  # of a training step with AdamW
UPDATE = (
    "optimizer",
    "gradients",
    "compile s",
    "first s",
    "between ms",
    "refresh ms",
    "mean ms",
    "/ adamw",
    "state MiB",
)
TRAIN = ("optimizer", "between ms", "refresh ms", "mean ms", "/ adamw", "loss")


class Report:
    """All that has been measured."""

    def __init__(self):
        self.messages = []

    def add(self, name, message):
        """Take a message in; returns the lines that it makes."""
        message = {"name": name, **message}
        self.messages.append(message)
        if "device" in message:
            return [self._device(message)]
        if "gradient" in message:
            return [_gradient(message)]
        if "update" in message:
            return [_line(UPDATE, self._update(message))]
        if "train" in message:
            return [_line(("training", *TRAIN[1:]), self._train(message))]
        if "failed" in message:
            return [f"{name} FAILED: {message['failed']}"]
        return [str(message[kind]) for kind in ("note", "stage") if kind in message]

    def complete(self, names):
        """Whether every optimizer has figures, all finite, and none has failed."""
        measured = {m["name"] for m in self.messages if "update" in m}
        sound = all(m.get("finite", True) for m in self.messages)
        return measured >= set(names) and sound and not self._of("failed")

    def markdown(self):
        """Everything, as a page."""
        lines = ["# One step of every optimizer on the shapes of a transformer", ""]
        lines += [self._device(m) + "." for m in self._of("device")[:1]]
        lines += ["", "## `update` and `apply_updates`", ""]
        lines += _table(UPDATE, map(self._update, self._of("update")))
        lines += ["", "## Whole training steps", ""]
        lines += [f"- {_gradient(m)}" for m in self._of("gradient")]
        lines += ["", f"The target is at most {TARGET} of the step with AdamW.", ""]
        lines += _table(TRAIN, map(self._train, self._of("train")))
        lines += ["", "## Settings", ""]
        lines += [f"- {row.name}: {row.note}" for row in gpu_rows.ROWS]
        lines += [f"- {gpu_rows.LEFT_OUT}"]
        problems = [f"- {m['name']}: {m['failed']}" for m in self._of("failed")]
        problems += [f"- {m['note']}" for m in self._of("note")]
        return "\n".join([*lines, *(["", "## Problems", "", *problems] if problems else []), ""])

    def _of(self, kind):
        return [m for m in self.messages if kind in m]

    def _adamw(self, kind, value):
        """The mean step with AdamW, of the same kind."""
        found = [m for m in self._of(kind) if m["name"] == "adamw" and m[kind] == value]
        return found[0]["mean_s"] if found else None

    def _ratio(self, kind, message):
        base = self._adamw(kind, message[kind])
        return "-" if base is None else f"{message['mean_s'] / base:.2f}"

    def _device(self, message):
        shapes = ", ".join(f"{name} {size}" for name, size in message["shapes"].items())
        return f"{message['device']} ({message['platform']}), JAX {message['jax']}; {shapes}"

    def _update(self, m):
        return (
            m["name"] + _warning(m),
            m["update"],
            f"{m['compile_s']:.1f}",
            f"{m['first_s']:.2f}",
            *map(_milliseconds, (m["between_s"], m["refresh_s"], m["mean_s"])),
            self._ratio("update", m),
            f"{m['state_bytes'] / 2**20:,.0f}",
        )

    def _train(self, m):
        return (
            m["name"] + _warning(m),
            *map(_milliseconds, (m["between_s"], m["refresh_s"], m["mean_s"])),
            self._ratio("train", m),
            "{:.3f} → {:.3f}".format(*m["losses"]),
        )


def _warning(message):
    """What is wrong with the figures."""
    wrong = [] if message["finite"] else ["NOT FINITE"]
    counts = ("skipped_steps", "failed_refreshes")
    wrong += [f"{message[k]} {k.replace('_', ' ')}" for k in counts if message[k]]
    return f" ({', '.join(wrong)})" if wrong else ""


def _gradient(message):
    return (
        f"gradient ({message['gradient']}; attention by {message['attention']}): "
        f"compiled in {message['compile_s']:.1f} s, {_milliseconds(message['median_s'])} ms"
    )


def _milliseconds(seconds):
    return "-" if seconds is None else f"{1e3 * seconds:.2f}"


def _line(head, cells):
    pairs = zip(head[1:], cells[1:], strict=True)
    return f"{cells[0]:16} " + "  ".join(f"{name} {cell}" for name, cell in pairs)


def _table(head, rows):
    lines = [head, ("---", *["---:"] * (len(head) - 1)), *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines]
