"""The queue over Redis or Valkey, for API processes and workers on any number of machines.

All that is shared lives under ``{pushforward}:`` and is changed by the scripts in ``scripts/``, each of
which is atomic:

    <class>:<name>/<version>   streams of chunk ids; class is "interactive" or "bulk"
    <class>:any                the same, for versions that no worker has yet: who reads one loads it
    again, alone               chunks whose worker was lost: read first; and the last time, with nothing else
    job:<id>                   hash: entry in which stream, attempts (the fence), owner, deadline, who waits
    in:<id>                    the chunk itself; both expire
    reply:<api>                stream of answers to one API process
    api:<api>, worker:<id>     what lives, and what it holds or says of itself; they expire unless renewed
    orders                     hash: versions that were loaded or unloaded by hand
    dead                       stream of the last hundred chunks that were given up

A lease is an entry of a consumer group that was read and not acknowledged; its worker renews it, for as long
as its loop turns, by claiming the entry again.  ``front`` is the end that asks, ``back`` the one that
solves.
"""
