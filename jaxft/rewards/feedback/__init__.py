"""AI feedback (Bai et al. 2022, arXiv:2212.08073; Lee et al. 2023, arXiv:2309.00267): a written constitution, the
questions that it asks, judges that answer them, and what follows from their answers.

A judge is anything with `asking.Judge`'s two methods: an endpoint of chat completions (`endpoint`), or a model that the
command line has loaded. Nothing here knows a model.
"""
