"""Rows in a JSON file that is whole at any time."""

import dataclasses
import json
import os

import races


def entry(what, race):
    return {"what": what, "race": dataclasses.asdict(race)}


class Results:
    """What is known so far, in a file that is whole at any time."""

    def __init__(self, path, header):
        self.path = path
        self.known = header | {"rows": [], "left_out": []}
        if path.exists():
            before = json.loads(path.read_text())
            for key in header:
                if before[key] != header[key]:
                    raise SystemExit(
                        f"{path} is of another {key}: {before[key]}. Received: "
                        f"{header[key]}. Name another file, --output FILE."
                    )
            self.known["rows"] = before["rows"]

    def done(self, what, race):
        wanted = entry(what, race)
        return any(wanted.items() <= row.items() for row in self.known["rows"])

    def add(self, row):
        self.known["rows"].append(row)
        self.write()

    def leave_out(self, what, race, reason):
        self.known["left_out"].append(entry(what, race) | {"reason": reason})

    def write(self):
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.known, indent=1) + "\n")
        os.replace(part, self.path)


def shown(row):
    """A row in a line."""
    cells = []
    for name, known in row["contestants"].items():
        value = known.get("failure")
        if value is None:
            ms = known.get("ms")
            value = f"{ms['median']:.2f} ms" if ms else f"{known.get('mb')} MB"
        cells.append(f"{name}: {value}")
    race = races.Race(**row["race"])
    return (
        f"{row['what']} {race.task} {race.shape} {race.precision}  {'; '.join(cells)}"
    )
