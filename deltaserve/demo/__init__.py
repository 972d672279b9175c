"""A small real model family: one base, its fine-tunes, the tasks they solve.

`deltaserve.demo.train.build_family` trains it in a few minutes on two cores and
keeps it in a cache folder; the demo, the tests and the benchmarks share it.

    tasks      seeded (prompt, answer) examples with disjoint splits
    corpus     generic text for the base
    tokenizer  characters and a few words, chat templates
    recipe     every number of the training, and its fingerprint
    fit        the optimisation loop
    train      builds what is missing, atomically
    family     what was built: paths, scores, loading
    score      greedy reference decoding and exact match

`deltaserve demo` shows it at work:

    showcase        train, compress, serve, ask, judge
    workspace       the demo's folder and the deltas in it
    server_process  `deltaserve serve` as a process that surely ends
    questions       held-out prompts through the OpenAI client, all models at once
    results         every number, and what was promised
    table, display  for people: the results, the progress
"""
