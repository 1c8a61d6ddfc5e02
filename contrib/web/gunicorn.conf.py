"""Run `gunicorn` in this folder, as the user who owns the files; it finds this file by its name."""

import os

chdir = os.path.dirname(os.path.abspath(__file__))  # where bgtasks.py and bgtasks_web.py lie
wsgi_app = "bgtasks_web:application"
bind = "127.0.0.1:8001"  # never 0.0.0.0: nginx or Apache in front of it speak https
worker_class = "gthread"  # a slow visitor keeps one thread busy, and not the whole service
threads = 4
timeout = 30  # a request needs far less; with web_inline = 1, web_max_execution_time and 10 s
# Where the param file lies elsewhere: BGTASKS_PARAM_FILE=/etc/bgtasks.params gunicorn
