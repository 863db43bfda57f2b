"""The resident worker: one long-lived process that holds base model and data, behind a Unix socket.

``settings`` says how to start it, ``service`` runs it, ``connection`` talks to it. Only the process that
``supervisor`` starts, ``model_process``, imports torch.
"""
