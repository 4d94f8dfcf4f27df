"""Lists the benchmarks: python -m benchmarks."""

import ast
from pathlib import Path


def main() -> None:
    for file in sorted(Path(__file__).parent.glob("[a-z]*.py")):
        about = ast.get_docstring(ast.parse(file.read_text())) or ""
        if "python -m benchmarks." in about:  # the others are helpers
            print(f"python -m benchmarks.{file.stem}\n    {about.splitlines()[0]}")


if __name__ == "__main__":
    main()
