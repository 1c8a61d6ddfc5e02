@echo off
rem bgtasks does not run on Windows yet: it says so in log\cron.log and ends with 69.
rem Copy this file beside bgtasks.py. cron.cmd [PYTHON.EXE] wakes it, with cron.params beside it if there
rem is one, and appends what it says to log\cron.log. Without an argument the launcher py.exe is used.
setlocal
cd /d "%~dp0" || exit /b 73
set "PYTHON=%~1"
if not defined PYTHON set "PYTHON=py.exe"
set "PARAMS="
if exist cron.params set "PARAMS=--param_file=cron.params"
if not exist log mkdir log || exit /b 73
"%PYTHON%" -m bgtasks %PARAMS% --verbose=1 >>log\cron.log 2>&1
exit /b %ERRORLEVEL%
