"""Pages of the documentation, whose numbers the benchmarks write."""

import re


def filled(page, name, text):
    """`page` with `text` between the comments that name it."""
    pattern = rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)"
    page, count = re.subn(
        pattern, lambda m: m[1] + text + "\n" + m[2], page, flags=re.S
    )
    if count != 1:
        raise SystemExit(
            f"The page must have one pair of comments <!-- {name} --> and "
            f"<!-- end of {name} -->. Received: {count} of them."
        )
    return page
