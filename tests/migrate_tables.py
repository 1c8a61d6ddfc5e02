"""The task tables of four systems, as their installers make them, with what can stand in them."""

TABLES = r"""
CREATE TABLE `priv_backgroundtask` (
  `id` int(11) NOT NULL AUTO_INCREMENT,
  `class_name` varchar(255) DEFAULT '',
  `first_run_date` datetime DEFAULT NULL,
  `latest_run_date` datetime DEFAULT NULL,
  `next_run_date` datetime DEFAULT NULL,
  `total_exec_count` int(11) DEFAULT 0,
  `latest_run_duration` decimal(8,3) DEFAULT 0.000,
  `min_run_duration` decimal(8,3) DEFAULT 0.000,
  `max_run_duration` decimal(8,3) DEFAULT 0.000,
  `average_run_duration` decimal(8,3) DEFAULT 0.000,
  `running` tinyint(1) DEFAULT 0,
  `status` enum('active','paused','removed') DEFAULT 'active',
  `system_user` varchar(255) DEFAULT '',
  PRIMARY KEY (`id`),
  KEY `class_name` (`class_name`(95))
) ENGINE=InnoDB DEFAULT CHARSET=utf8mb4;
CREATE TABLE `glpi_crontasks` (
  `id` int(10) unsigned NOT NULL AUTO_INCREMENT,
  `itemtype` varchar(100) NOT NULL,
  `name` varchar(150) NOT NULL COMMENT 'task name',
  `frequency` int(11) NOT NULL COMMENT 'second between launch',
  `param` int(11) DEFAULT NULL COMMENT 'task specify parameter',
  `state` int(11) NOT NULL DEFAULT 1 COMMENT '0:disabled, 1:waiting, 2:running',
  `mode` int(11) NOT NULL DEFAULT 1 COMMENT '1:internal, 2:external',
  `allowmode` int(11) NOT NULL DEFAULT 3 COMMENT '1:internal, 2:external, 3:both',
  `hourmin` int(11) NOT NULL DEFAULT 0,
  `hourmax` int(11) NOT NULL DEFAULT 24,
  `logs_lifetime` int(11) NOT NULL DEFAULT 30 COMMENT 'number of days',
  `lastrun` timestamp NULL DEFAULT NULL COMMENT 'last run date',
  `lastcode` int(11) DEFAULT NULL COMMENT 'last run return code',
  `comment` text DEFAULT NULL,
  `date_mod` timestamp NULL DEFAULT NULL,
  `date_creation` timestamp NULL DEFAULT NULL,
  PRIMARY KEY (`id`),
  UNIQUE KEY `unicity` (`itemtype`,`name`)
) ENGINE=InnoDB DEFAULT CHARSET=utf8mb4 COMMENT='Task run by internal / external cron.';
CREATE TABLE `glpi_crontasklogs` (`id` int(10) unsigned NOT NULL PRIMARY KEY, `content` text);
CREATE TABLE `shop_cron_schedule` (
  `schedule_id` int(10) unsigned NOT NULL AUTO_INCREMENT COMMENT 'Schedule ID',
  `job_code` varchar(255) NOT NULL DEFAULT '0' COMMENT 'Job Code',
  `status` varchar(7) NOT NULL DEFAULT 'pending' COMMENT 'Status',
  `messages` text DEFAULT NULL COMMENT 'Messages',
  `created_at` timestamp NOT NULL DEFAULT current_timestamp() COMMENT 'Created At',
  `scheduled_at` timestamp NULL DEFAULT NULL COMMENT 'Scheduled At',
  `executed_at` timestamp NULL DEFAULT NULL COMMENT 'Executed At',
  `finished_at` timestamp NULL DEFAULT NULL COMMENT 'Finished At',
  PRIMARY KEY (`schedule_id`)
) ENGINE=InnoDB DEFAULT CHARSET=utf8mb4 COMMENT='Cron Schedule';
CREATE TABLE `shop_core_config_data` (
  `config_id` int(10) unsigned NOT NULL AUTO_INCREMENT COMMENT 'Config ID',
  `scope` varchar(8) NOT NULL DEFAULT 'default' COMMENT 'Config Scope',
  `scope_id` int(11) NOT NULL DEFAULT 0 COMMENT 'Config Scope ID',
  `path` varchar(255) NOT NULL DEFAULT 'general' COMMENT 'Config Path',
  `value` text DEFAULT NULL COMMENT 'Config Value',
  PRIMARY KEY (`config_id`)
) ENGINE=InnoDB DEFAULT CHARSET=utf8mb4 COMMENT='Config Data';
CREATE TABLE `periodictask` (
  `id` int(11) NOT NULL,
  `name` varchar(64) NOT NULL,
  `active` tinyint(1) NOT NULL,
  `retry_if_failed` tinyint(1) NOT NULL,
  `interval` varchar(256) NOT NULL,
  `nodes` varchar(256) NOT NULL,
  `taskmodule` varchar(256) NOT NULL,
  `ordering` int(11) NOT NULL,
  `last_update` datetime NOT NULL,
  PRIMARY KEY (`id`)
) ENGINE=InnoDB DEFAULT CHARSET=utf8mb4;
CREATE TABLE `periodictaskoption` (
  `id` int(11) NOT NULL,
  `periodictask_id` int(11) DEFAULT NULL,
  `key` varchar(255) NOT NULL,
  `value` varchar(2000) DEFAULT NULL,
  PRIMARY KEY (`id`)
) ENGINE=InnoDB DEFAULT CHARSET=utf8mb4;
"""

ROWS = r"""
INSERT INTO `priv_backgroundtask` VALUES
(1,'ExecAsyncTask','2024-01-01 00:00:00','2024-06-01 00:00:00','2024-06-01 00:00:02',9999999,
 0.1,0.1,9,0.1,0,'active','www-data'),
(2,'BackupExec','2024-01-01 23:30:00','2024-04-09 23:30:05','2024-04-10 23:30:00',100,
 0.1,0.1,9,0.1,0,'active','www-data'),
(3,'Vendor\\Sync','2024-01-01 00:00:00','2024-01-01 10:00:10','2024-01-01 10:10:00',60,
 0.1,0.1,9,0.1,1,'paused','www-data'),
(4,'Gone','2024-01-01 00:00:00','2024-01-01 10:00:10','2024-01-01 10:10:00',60,
 0.1,0.1,9,0.1,0,'removed','www-data'),
(5,'SwitchedOff',NULL,NULL,'3000-01-01 00:00:00',0,0,99999.999,0,0,0,'active',''),
(6,'NeverRan',NULL,NULL,'2024-01-01 00:00:00',0,0,99999.999,0,0,0,'active','');
INSERT INTO `glpi_crontasks` (`itemtype`,`name`,`frequency`,`param`,`state`,`mode`,`allowmode`,
 `hourmin`,`hourmax`,`logs_lifetime`,`lastrun`,`comment`) VALUES
('QueuedNotification','queuednotification',60,50,1,2,3,0,24,30,'2024-01-01 00:00:00',NULL),
('CartridgeItem','cartridge',86400,10,0,1,3,0,24,30,NULL,'it''s \\ off;\r\n(1, ''x''); 😀'),
('Ticket','alertnotclosed',43200,NULL,1,1,3,22,6,0,NULL,NULL),
('Ticket','closeticket',43200,NULL,2,1,3,8,8,800,NULL,NULL),
('Telemetry','telemetry',2592000,NULL,1,1,1,0,24,10,NULL,NULL),
('CleanSoftwareCron','cleanorphans',604800,1000,1,1,3,0,24,30,NULL,NULL),
('PluginFooTask','cleanorphans',90,NULL,1,1,3,0,24,30,NULL,NULL);
INSERT INTO `glpi_crontasklogs` VALUES (1, 'INSERT INTO `glpi_crontasks` VALUES (1,2);');
INSERT INTO `shop_cron_schedule` (`job_code`,`status`,`messages`) VALUES
('only_seen','success',NULL),('only_seen','error','a;\nINSERT INTO `cron_schedule` VALUES (1);\n'),
('sitemap_generate','pending',NULL);
INSERT INTO `shop_core_config_data` (`scope`,`scope_id`,`path`,`value`) VALUES
('default',0,'general/locale/timezone','Europe/Berlin'),
('stores',1,'general/locale/timezone','Asia/Tokyo'),
('default',0,'crontab/default/jobs/sitemap_generate/schedule/cron_expr','0 0 */2 * *'),
('default',0,'crontab/default/jobs/off/schedule/cron_expr','0 0 30 2 *'),
('default',0,'crontab/index/jobs/first_monday/schedule/cron_expr','5 4 1-7 * mon'),
('default',0,'crontab/index/jobs/friday_13/schedule/cron_expr','0 0 13 * 5'),
('default',0,'crontab/default/jobs/as_it_is/schedule/cron_expr','*/5 * * * *'),
('default',0,'backup/schedule/expr','15 3 * * 1-5');
INSERT INTO `periodictask` VALUES
(1,'count tokens',1,1,'0 6 * * 1-5','pinode1, pinode2','SimpleStats',1,'2024-01-01 00:00:00'),
(2,'Zähler',0,0,'*/10 * */2 * 5','localnode','EventCounter',5,'2024-01-01 00:00:00'),
(3,'impossible',1,1,'0 0 31 2 *','localnode','SimpleStats',0,'2024-01-01 00:00:00'),
(4,'it''s',1,1,'0 22-2 * * 7','localnode','EventCounter',0,'2024-01-01 00:00:00');
INSERT INTO `periodictaskoption` VALUES (1,1,'total_tokens','True'),(2,2,'event_counter','a "b"'),
(3,2,'api_key','s3cret-value');
"""
