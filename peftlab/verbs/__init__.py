"""The verbs of `python -m peftlab <verb>`: one module each, with its HELP, its arguments(parser) and its run(args)."""
