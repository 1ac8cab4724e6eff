"""The host's side of the guest agent: run commands in a guest, copy files, set its clock.

`session.AgentSession` speaks the protocol of docs/agent.md over any connected stream socket. The guest at the
other end is hostile: every frame is checked and everything it can make the host hold is bounded. All of this
runs in the VMM or in a command, never in a worker, and imports little.
"""
