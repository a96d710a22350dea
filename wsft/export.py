"""python -m wsft.export runs/first/checkpoints/step_1000 OUT     # a checkpoint as a Hugging Face folder: see run/export.py"""

from wsft.run.export import main

if __name__ == "__main__":
    main()
